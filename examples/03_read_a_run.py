"""Open a run, choose samples, and train a probe from the disk: does a layer's last row say whether the choice is the right one?

python examples/03_read_a_run.py [RUN_FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from AutomaticEval import open_run

if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
else:  # what `python main.py --capture_activations --benchmark demo_facts` does
    from AutomaticEval.evaluation.benchmark import Benchmark
    from AutomaticEval.evaluation.run import run_benchmark
    from AutomaticEval.models.loading import load_model
    from AutomaticEval.selection import Selection

    outcome = run_benchmark(
        load_model("demo"), Benchmark(("demo_facts",)), Selection.parse(), save_dir=Path(tempfile.mkdtemp())
    )
    folder = outcome.folder

run = open_run(folder)
print(run, "\n", run.table()[["doc_id", "choice", "response", "logprob", "correct"]].head(4))
train, test = (
    run.where(doc_id=lambda number, odd=odd: number % 2 == odd) for odd in (0, 1)
)  # by question, never by choice

torch.manual_seed(0)
probe = torch.nn.Linear(run.rows("layer_2").shape[1], 1)
optimizer = torch.optim.Adam(probe.parameters(), lr=0.01, weight_decay=1e-3)
for _ in range(20):
    for x, right in DataLoader(train.dataset("layer_2", position="last", label="correct"), batch_size=32, shuffle=True):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(probe(x.float())[:, 0], right.float())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
found = probe(test.activations("layer_2", position="last").float())[:, 0] > 0
print(f"questions that were not trained on: {(found == torch.tensor(test.column('correct'))).float().mean():.2f} right")
