"""Which heads does a model need for sums? Ablate each head while the model answers, and print the head's strength beside the result.

python examples/06_heads.py
"""

from AutomaticEval import ActivationExtractor, Edit, editing, generate_inference, load_model

loaded = load_model("demo")
sums = [(12, 7), (3, 4), (21, 15), (8, 30), (33, 2), (17, 19)]
questions = [f"Question: What is {one} + {other}?\nAnswer:" for one, other in sums]


def n_right() -> int:
    answers = [generate_inference(question, loaded, max_new_tokens=6) for question in questions]
    return sum(answer.split()[:1] == [str(sum(terms))] for answer, terms in zip(answers, sums, strict=True))


with ActivationExtractor(loaded) as extractor:
    extractor.extract_activations(questions)
strength = extractor.compute_R_h()  # (layer, head) -> mean norm of what the head adds to the stream

right = {}
for layer, head in strength:
    with editing(loaded.model, Edit.scale(f"layer_{layer}.z", 0.0, heads=[head])):
        right[layer, head] = n_right()
print(f"right: {n_right()} of {len(sums)}; without")
for layer, head in sorted(right, key=lambda place: right[place])[:5]:
    print(f"  head {head} of layer {layer} {right[layer, head]}, R_h {strength[layer, head]:.2f}")
