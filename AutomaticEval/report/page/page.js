"use strict";
// The table of questions and the chosen one. All text is set as text: nothing of the data is read as mark-up.
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows;
const PAGE = 25;
const HEATS = 8;
const at = (id) => document.getElementById(id);
const state = { key: "number", isDown: false, page: 0, shown: [], chosen: -1, place: Math.max(0, data.keys.length - 1) };

function made(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function verdictOf(correct) {
  return correct === true ? "right" : correct === false ? "wrong" : "no verdict";
}

function changeOf(row) {
  if (row.other === undefined || row.other === null || row.correct === null) return "";
  return row.correct === row.other ? "same" : row.other ? "gained" : "lost";
}

rows.forEach((row, number) => {
  row.number = number;
  row.verdict = verdictOf(row.correct);
  const lines = (row.prompt || "").trim();
  row.text = lines.length > 140 ? lines.slice(0, 140) + "…" : lines;
  row.words = [row.task, row.doc, row.prompt, row.response, row.thinking, row.answer, ...row.choices].join("\n").toLowerCase();
});

function matches(row) {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  if (at("task").value && row.task !== at("task").value) return false;
  if (at("verdict").value && row.verdict !== at("verdict").value) return false;
  if (at("change") && at("change").value && changeOf(row) !== at("change").value) return false;
  return words.every((word) => row.words.includes(word));
}

function compared(one, other) {
  const a = one[state.key], b = other[state.key];
  const isA = a === null || a === undefined, isB = b === null || b === undefined;
  if (isA || isB) return isA - isB || one.number - other.number; // what is not known stands last, either way
  const order = a < b ? -1 : a > b ? 1 : 0;
  return (state.isDown ? -order : order) || one.number - other.number;
}

function select() {
  state.shown = rows.filter(matches).sort(compared);
  state.page = 0;
  list();
}

function number(value) {
  return value === null || value === undefined ? "" : value.toFixed(3);
}

function verdictCell(correct) {
  const name = verdictOf(correct);
  return made("td", name, name === "no verdict" ? "" : name);
}

// A name such as high_school_physics breaks at its underscores, not within a word.
function breakable(name) {
  const all = made("bdi");
  name.split(/(?<=_)/).forEach((part) => all.append(part, made("wbr")));
  return all;
}

function line(row) {
  const tr = made("tr");
  tr.setAttribute("aria-selected", String(row.number === state.chosen));
  tr.append(made("td", String(row.number + 1), "number"));
  const cell = made("td"), button = made("button");
  button.type = "button";
  button.append(made("bdi", row.text || "(empty)"));
  button.addEventListener("click", () => choose(row.number, true));
  cell.append(button);
  const task = made("td", null, "wider");
  task.append(breakable(row.task));
  tr.append(cell, task, verdictCell(row.correct));
  Object.keys(data.columns).filter((key) => data.columns[key]).forEach((key) => tr.append(made("td", number(row[key]), "number wider")));
  if (data.hasSecond) tr.append(row.other === undefined ? made("td", "not asked") : verdictCell(row.other));
  return tr;
}

function list() {
  const n = state.shown.length, last = Math.max(0, Math.ceil(n / PAGE) - 1);
  state.page = Math.min(state.page, last);
  at("rows").replaceChildren(...state.shown.slice(state.page * PAGE, (state.page + 1) * PAGE).map(line));
  at("count").textContent = n === rows.length ? `${n} questions` : `${n} of ${rows.length} questions`;
  at("page").textContent = n ? `Page ${state.page + 1} of ${last + 1}` : "No question fits";
  at("back").disabled = state.page === 0;
  at("next").disabled = state.page >= last;
  document.querySelectorAll("#table th").forEach((head) => {
    if (head.dataset.key === state.key) head.setAttribute("aria-sort", state.isDown ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function choose(which, isAsked) {
  state.chosen = which;
  document.querySelectorAll("#rows tr").forEach((tr, index) => {
    const row = state.shown[state.page * PAGE + index];
    tr.setAttribute("aria-selected", String(row && row.number === which));
  });
  show(rows[which]);
  ask(rows[which]);
  if (isAsked && isBelow()) at("chosen").focus();
}

// Whether the chosen question stands below the table, and not beside it.
function isBelow() {
  return getComputedStyle(document.querySelector(".split")).gridTemplateColumns.split(" ").length === 1;
}

// A served page asks for the rows of a question when it is chosen, and for texts that were cut. A file holds all that it shows.
async function ask(row) {
  if (!data.isServed || row.isAsked) return;
  row.isAsked = true;
  row.told = "";
  try {
    const [held, whole] = await Promise.all([answerTo(`rows/${row.number}`), row.isCut ? answerTo(`texts/${row.number}`) : {}]);
    if (held.tokens) data.tokens[row.number] = held.tokens;
    if (held.lens) data.lens[row.number] = held.lens;
    Object.assign(row, whole, { isWhole: row.isCut, told: "The run has no rows of the tokens of this prompt." });
  } catch (failure) {
    row.told = `The rows were not read: ${failure.message}`;
    row.isAsked = false; // it is asked for again when it is chosen again
  }
  if (state.chosen === row.number) show(row);
}

async function answerTo(path) {
  const answer = await fetch(path).catch(() => { throw new Error("the program that serves this page does not answer."); });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error);
  return told;
}

function block(title, text, isOpen) {
  const details = made("details");
  details.open = isOpen;
  details.append(made("summary", title));
  const pre = made("pre", text);
  pre.dir = "auto";
  details.append(pre);
  return details;
}

function show(row) {
  const parts = [];
  const title = made("h3");
  title.append(made("bdi", `${row.task || "Question"}${row.doc === null ? "" : `, document ${row.doc}`}${row.repeat ? `, answer ${row.repeat + 1}` : ""}`), " ");
  title.append(made("span", row.verdict, row.correct === null ? "" : row.verdict));
  parts.push(title);
  const slider = places(row);
  if (slider) parts.push(slider);
  const choices = made("div");
  choices.id = "choices";
  const tokens = made("div");
  tokens.id = "tokens";
  parts.push(choices, tokens);
  const beginning = row.isWhole ? "" : data.beginnings[row.task];
  if (beginning) parts.push(block("What all prompts of this task begin with", beginning, false));
  parts.push(made("h4", beginning ? "Prompt, after that" : "Prompt"));
  const pre = made("pre", row.prompt);
  pre.dir = "auto";
  parts.push(pre);
  if (row.thinking !== null) parts.push(block("Thinking", row.thinking, false));
  const said = row.thinking === null ? row.response : row.answer === null ? "(the thinking was not finished)" : row.answer;
  if (said !== null) {
    parts.push(made("h4", row.thinking === null ? "Response" : "Answer, after thinking"));
    const answer = made("pre", said);
    answer.dir = "auto";
    parts.push(answer);
  }
  if (!row.choices.length) {
    const target = made("p", null, "tag");
    target.append("Expected: ", made("bdi", String(row.target ?? "not known")), ". Read from the response: ", made("bdi", String(row.prediction ?? "nothing")), ".");
    parts.push(target);
  }
  if (row.isCut) parts.push(made("p", "Long texts are cut on this page; the run has all of them.", "tag"));
  at("chosen").replaceChildren(...parts);
  paint(row);
}

function lensOf(row) {
  return data.lens[row.number];
}

function places(row) {
  if (!data.keys.length || (!data.tokens[row.number] && !lensOf(row))) return null;
  const label = made("label", "Place: "), name = made("output"), slider = made("input");
  label.className = "tag";
  name.id = "place";
  slider.type = "range";
  slider.id = "slider";
  slider.min = "0";
  slider.max = String(data.keys.length - 1);
  slider.value = String(state.place);
  slider.addEventListener("input", () => { state.place = Number(slider.value); paint(row); });
  label.append(name, slider);
  return label;
}

function paint(row) {
  const key = data.keys[state.place];
  const slider = at("slider");
  if (slider) {
    at("place").textContent = key;
    slider.setAttribute("aria-valuetext", key);
  }
  paintChoices(row, key);
  paintTokens(row, key);
}

function paintChoices(row, key) {
  const box = at("choices");
  box.replaceChildren();
  if (!row.choices.length) return;
  const lens = lensOf(row), index = lens ? lens.places.indexOf(key) : -1;
  const byLayer = index >= 0 ? lens.choices[index] : null;
  box.append(made("h4", byLayer ? `Choices: probability by the lens at ${key}, then the model's own` : "Choices, with the model's probability"));
  row.choices.forEach((text, which) => {
    const own = row.probabilities[which], value = byLayer ? byLayer[which] : own;
    const line = made("div", null, "choice"), name = made("span"), bar = made("span", null, "bar"), part = made("i");
    name.append(made("bdi", text));
    const told = [which === row.prediction ? "taken" : "", which === row.target ? "right" : ""].filter(Boolean).join(", ");
    if (told) name.append(" ", made("span", told, which === row.target ? "right tag" : "tag"));
    part.style.width = `${100 * (value ?? 0)}%`;
    bar.append(part);
    line.append(name, bar, made("span", byLayer ? `${number(value)} (${number(own)})` : number(value), "number"));
    box.append(line);
  });
}

function paintTokens(row, key) {
  const box = at("tokens");
  const held = data.tokens[row.number];
  box.replaceChildren();
  if (!held) {
    box.append(made("p", row.told || data.tokensTold, "tag"));
    return;
  }
  const values = held.values[key];
  if (!values) {
    box.append(made("p", `No ${data.measure} of tokens at ${key}.`, "tag"));
    return;
  }
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  box.append(made("h4", `Tokens of the prompt by ${data.measure} at ${key}: ${known.length ? `${known[0]} to ${known[known.length - 1]}` : "none known"}`));
  if (held.tokens.length < held.nPrompt) box.append(made("p", `${held.tokens.length} of ${held.nPrompt} tokens have rows here.`, "tag"));
  const texts = made("div", null, "tokens"), nBelow = new Map();
  known.forEach((value, index) => { if (!nBelow.has(value)) nBelow.set(value, index); });
  held.tokens.forEach((token, index) => {
    const value = values[index], span = made("span", token);
    span.dir = "auto";
    span.title = `position ${held.positions[index]}, ${data.measure} ${value === null ? "not known" : value}`;
    if (value !== null) {
      const below = nBelow.get(value) / Math.max(1, known.length - 1);
      const share = Math.round((data.isRank ? 1 - below : below) * HEATS) / HEATS;
      span.style.backgroundColor = `rgb(var(--heat) / ${0.55 * share})`;
    }
    texts.append(span);
  });
  box.append(texts, made("p", data.isRank ? "A stronger colour: the next token has a better rank." : "A stronger colour: a larger norm, by its place among the tokens of this prompt.", "tag"));
}

// In the frame of a notebook, "#probe" would be a place of the notebook, and a form may not be sent.
function stay(event) {
  const link = event.type === "click" && event.target.closest("a[href^='#']");
  if (link) at(link.getAttribute("href").slice(1)).scrollIntoView();
  if (link || (event.key === "Enter" && event.target.id === "search")) event.preventDefault();
}

function move(event) {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  const buttons = [...document.querySelectorAll("#rows button")];
  const next = buttons[buttons.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1)];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}

if (location.protocol === "about:") ["click", "keydown"].forEach((name) => document.addEventListener(name, stay));
if (at("table")) {
  [...new Set(rows.map((row) => row.task))].sort().forEach((task) => {
    const option = made("option", task);
    option.value = task;
    at("task").append(option);
  });
  at("filters").addEventListener("input", select);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("rows").addEventListener("keydown", move);
  at("back").addEventListener("click", () => { state.page -= 1; list(); });
  at("next").addEventListener("click", () => { state.page += 1; list(); });
  document.querySelectorAll("#table th button").forEach((button) => button.addEventListener("click", () => {
    const key = button.parentElement.dataset.key;
    state.isDown = state.key === key ? !state.isDown : false;
    state.key = key;
    select();
  }));
  select();
}
if (rows.length) choose(Math.max(0, rows.findIndex((row) => data.tokens[row.number])), false);
