"""In code that calls lm-eval itself: pass a model that captures, and join the captured samples to the scores."""

import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import AutomaticEval
from AutomaticEval import HFActivations, open_run

tasks = Path(AutomaticEval.__file__).parent / "evaluation" / "tasks" / "demo"
lm = HFActivations("demo", activation_save_dir=tempfile.mkdtemp(), layers_to_capture="0,-1", batch_size=16)
results = simple_evaluate(
    model=lm, tasks=["demo_facts"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), limit=40
)
print(f"accuracy {results['results']['demo_facts']['acc,none']:.2f}, as lm-eval has it")

questions = open_run(lm.finish(results)).questions()
for correct in (False, True):
    rows = questions.where(correct=correct).activations("layer_3")  # the last token before any choice
    print(f"correct={correct}: {len(rows)} questions, mean norm of the last layer {rows.norm(dim=1).mean():.1f}")
