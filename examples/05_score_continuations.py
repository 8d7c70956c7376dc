"""How likely a model finds each of several answers, and what its last layer held where each was scored."""

import torch

from AutomaticEval import score_continuations

examples = (
    "Question: What is the colour of grass?\nAnswer: green\n\nQuestion: What is the colour of snow?\nAnswer: white\n\n"
)
question = examples + "Question: What is the colour of the sky?\nAnswer:"
answers = [" blue", " green", " loud"]
scores = score_continuations(
    [(question, answer) for answer in answers],  # what they share is computed once
    "demo",
    capture_activations=True,
    layers_to_capture=[-1],
    positions="scored",
)
for answer, score in zip(answers, scores, strict=True):
    rows = score.activation_data["activations"]["layer_3"]
    print(f"{answer!r}: {score.logprob:.2f} nats over {len(score.logprobs)} tokens, rows {tuple(rows.shape)}")
first = [score.activation_data["activations"]["layer_3"][0] for score in scores]
assert all(torch.equal(first[0], row) for row in first)  # the token before the answers is one row
