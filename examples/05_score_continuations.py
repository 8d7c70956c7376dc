"""Score several answers to one question, and read the last layer at the positions that scored them."""

import torch

from AutomaticEval import score_continuations

examples = (
    "Question: What is the colour of grass?\nAnswer: green\n\nQuestion: What is the colour of snow?\nAnswer: white\n\n"
)
question = examples + "Question: What is the colour of the sky?\nAnswer:"
answers = [" blue", " green", " loud"]
scores = score_continuations(
    [(question, answer) for answer in answers],  # the tokens that they share are computed once
    "demo",
    capture_activations=True,
    layers_to_capture=[-1],
    positions="scored",
)
for answer, score in zip(answers, scores, strict=True):
    rows = score.activation_data["activations"]["layer_3"]
    print(f"{answer!r}: {score.logprob:.2f} nats over {len(score.logprobs)} tokens, rows {tuple(rows.shape)}")
first = [score.activation_data["activations"]["layer_3"][0] for score in scores]
assert all(torch.equal(first[0], row) for row in first)  # all answers share the row of the token before them
