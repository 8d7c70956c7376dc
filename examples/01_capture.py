"""Capture chosen layers of one prompt, load them again, and print statistics for each layer and how similar two prompts are.

python examples/01_capture.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import torch

from AutomaticEval import generate_inference_with_activations, load_activations

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
file = Path(tempfile.mkdtemp()) / "twelve.h5"

response, captured = generate_inference_with_activations(
    "Question: What is 12 + 30?\nAnswer:", model, file, layers_to_capture="0-1,-1", max_new_tokens=8
)
print("response:", response.strip())

loaded = load_activations(file)
assert all(torch.equal(loaded["activations"][key], rows) for key, rows in captured["activations"].items())

for key, rows in loaded["activations"].items():  # rows: [n_positions, d_model]
    print(
        f"{key:12} {tuple(rows.shape)}  mean {rows.mean():+.3f}  std {rows.std():.3f}  norm {rows.norm(dim=1).mean():.2f}"
    )

_, other = generate_inference_with_activations(
    "Question: What is 13 + 30?\nAnswer:", model, layers_to_capture="0-1,-1", max_new_tokens=8
)
last = captured["n_prompt_tokens"] - 1  # the position that predicts the response's first token
for key, rows in captured["activations"].items():
    similarity = torch.cosine_similarity(rows[last], other["activations"][key][last], dim=0)
    print(f"{key:12} cosine similarity of the two prompts' last tokens: {similarity:.3f}")
