"""Use the drop-in function inside your own evaluation loop: it writes one file for each question; then read one layer of all files.

python examples/02_benchmark_loop.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import torch

from AutomaticEval import answer_benchmark_question_with_activations, load_activations
from AutomaticEval.demo.world import facts

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
folder = tempfile.mkdtemp()

right = []
for fact in facts()[:12]:
    response, answer, _ = answer_benchmark_question_with_activations(
        fact.question, model, activation_save_dir=folder, choices=fact.choices, max_new_tokens=40
    )
    right.append(answer == "ABCD"[fact.answer])
    print(f"{fact.question:45} {answer}  {'right' if right[-1] else 'wrong'}  {'' if fact.seen else '(never read)'}")
print(f"accuracy: {sum(right)} of {len(right)}")

files = sorted(Path(folder).glob("*.h5"))  # file names begin with the time, so they sort in the order of the questions
last_rows = torch.stack([load_activations(file)["activations"]["layer_3"][-1] for file in files])
print("layer_3 at the last position of every question:", tuple(last_rows.shape))
