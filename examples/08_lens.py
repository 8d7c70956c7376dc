"""At which layer does the answer appear? The logit lens: the model's own output head reads every layer of a benchmark run."""

import matplotlib.pyplot as plt

from AutomaticEval import evaluate_with_activations, load_model, open_run

run = open_run(evaluate_with_activations("demo", "demo_facts").folder)  # 90 questions with four choices each
demo, table = load_model("demo"), run.table()
tokens = [sample["generated_ids"] for sample in run]  # the tokens of each choice

accuracy = {}
for key in run.keys:  # embeddings, layer_0, layer_1, …
    for number, ids in enumerate(tokens):
        rows = run.read(number, key)  # [n_tokens, d_model]: the positions that predict the choice's tokens
        logprobs = demo.model.lm_head(demo.model.model.norm(rows)).log_softmax(dim=-1)
        table.loc[number, "lens"] = logprobs[range(len(ids)), ids].sum().item()
    taken = table.loc[table.groupby("doc_id").lens.idxmax()]  # the likeliest choice of each question
    accuracy[key] = (taken.choice == taken.target).mean()
assert abs(table.lens - table.logprob).max() < 1e-4  # the last layer gives the benchmark's own numbers

plt.figure(figsize=(7, 3.2), layout="constrained")
plt.plot(list(accuracy), list(accuracy.values()), marker="o", label="the model's head, reading this layer")
plt.axhline(table.correct.mean(), color="black", linewidth=1, label="the benchmark's score")
plt.axhline(1 / 4, color="grey", linestyle=":", label="chance")
plt.ylabel("questions answered right")
plt.ylim(0, 1)
plt.legend(loc="lower right")
plt.savefig("lens.png", dpi=150)
print(", ".join(f"{key} {value:.2f}" for key, value in accuracy.items()))
