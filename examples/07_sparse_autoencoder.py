"""Train a small sparse autoencoder on the MLP neurons of one layer, streamed from a run folder in random order.

python examples/07_sparse_autoencoder.py
"""

import tempfile
from pathlib import Path

import torch

from AutomaticEval import FromHuggingFace, open_run

torch.manual_seed(0)
texts = [f"Question: What is {one} + {other}?\nAnswer: {one + other}" for one in range(40) for other in range(20)]
folder = Path(tempfile.mkdtemp()) / "features"
FromHuggingFace("demo", 2, texts, seq_length=64, save_features=folder).extract_features()

run = open_run(folder)
rows = run.rows("layer_2.mlp_post")
width = rows.shape[1]
encoder, decoder = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
scale = rows[:2000].std()
batches = run.batches("layer_2.mlp_post", 1024, seed=0)

losses = []
for _ in range(4):  # four passes over all rows, each in another order
    for batch in batches:
        features = encoder(batch / scale).relu()
        loss = (decoder(features) - batch / scale).square().mean() + 1e-4 * features.abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
print(
    f"{len(rows)} rows of {width}, {len(losses)} steps: loss {first:.3f} -> {last:.3f}, {(features > 0).float().mean():.2f} active"
)
print(f"loss went down: {last < 0.5 * first}")
