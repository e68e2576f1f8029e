"use strict";
const AT_ONCE = 60;
const MOST_WORDS = 24;
const MOST_CONCEPTS = 6;
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
const find = (id) => document.getElementById(id);

const runs = JSON.parse(find("data").textContent);
const counts = new Map();
runs.forEach((run, number) => {
  const words = run.concepts.flatMap(([label, , others]) => [label, ...others]);
  run.number = number;
  run.text = [run.name, ...words].join("\n").toLowerCase();
  run.score = Math.max(0, ...run.concepts.map(([, score]) => score));
  for (const word of new Set(words)) counts.set(word, (counts.get(word) ?? 0) + 1);
});
const orders = {
  name: (a, b) => collator.compare(a.name, b.name),
  score: (a, b) => b.score - a.score,
  concepts: (a, b) => b.concepts.length - a.concepts.length,
  latest: (a, b) => b.number - a.number,
};
runs.sort(orders.name);

const state = { query: "", sort: "name", page: 0 };
let shown = runs;

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function card(run) {
  const item = element("li");
  const link = element("a");
  link.href = run.place;
  const picture = element("img");
  picture.loading = "lazy";
  picture.decoding = "async";
  picture.alt = "";
  picture.src = run.thumbnail;
  const concepts = element("ul", "concepts");
  for (const [label, , words] of run.concepts.slice(0, MOST_CONCEPTS)) {
    const line = element("li");
    line.append(element("b", "", label), words.length ? `: ${words.join(", ")}` : "");
    concepts.append(line);
  }
  const more = run.concepts.length - MOST_CONCEPTS;
  if (more > 0) concepts.append(element("li", "", `and ${more} more`));
  link.append(picture, element("span", "name", run.name), concepts);
  item.append(link);
  return item;
}

function select() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  shown = runs.filter((run) => words.every((word) => run.text.includes(word)));
  if (state.sort !== "name") shown.sort(orders[state.sort]);
}

function show() {
  const last = Math.max(0, Math.ceil(shown.length / AT_ONCE) - 1);
  state.page = Math.min(state.page, last);
  const first = state.page * AT_ONCE;
  find("runs").replaceChildren(...shown.slice(first, first + AT_ONCE).map(card));
  find("count").textContent = `${shown.length} of ${runs.length} runs`;
  find("page").textContent = `page ${state.page + 1} of ${last + 1}`;
  find("pages").hidden = last === 0;
  find("earlier").disabled = state.page === 0;
  find("later").disabled = state.page === last;
  for (const button of find("words").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.value === state.query));
  }
}

function change(values) {
  Object.assign(state, { page: 0 }, values);
  select();
  show();
}

const frequent = [...counts].sort((a, b) => b[1] - a[1] || collator.compare(a[0], b[0])).slice(0, MOST_WORDS);
find("words").append(
  ...frequent.map(([word, count]) => {
    const item = element("li");
    const button = element("button", "", `${word} ${count}`);
    button.type = "button";
    button.value = word;
    button.addEventListener("click", () => {
      find("query").value = state.query === word ? "" : word;
      change({ query: find("query").value });
    });
    item.append(button);
    return item;
  }),
);
find("query").addEventListener("input", (event) => change({ query: event.target.value }));
find("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
for (const [id, step] of [["earlier", -1], ["later", 1]]) {
  find(id).addEventListener("click", () => {
    state.page += step;
    show();
    find("runs").scrollIntoView();
  });
}
show();
