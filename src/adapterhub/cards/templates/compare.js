"use strict";
const releases = JSON.parse(document.getElementById("data").textContent);
const byId = new Map(releases.map((it) => [it.id, it]));
const choices = ["a", "b"].map((name) => document.getElementById(name));
const table = document.getElementById("comparison");

const or = (value, otherwise) => (value === null || value === undefined ? otherwise : String(value));
const facts = [
  ["task", (it) => or(it.task, "not said")],
  ["base", (it) => it.base],
  ["base digest", (it) => it.base_digest.slice(0, 12)],
  ["base held in", (it) => it.held],
  ["kind", (it) => it.kind],
  ["licence", (it) => or(it.licence, "not stated")],
  ["made", (it) => it.created],
  ["rank", (it) => or(it.rank, "none")],
  ["weights", (it) => it.weights],
  ["known failure cases", (it) => or(it.failures, "not measured")],
];

const line = (name, ...values) => {
  const row = table.tBodies[0].insertRow();
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  row.append(head);
  for (const value of values) row.insertCell().textContent = value;
  row.classList.toggle("differs", values[0] !== values[1]);
};

const score = (it) => (it ? `${it.adapter} (${it.interval}), base ${it.base}` : "not measured");

const compare = () => {
  const pair = choices.map((choice) => byId.get(choice.value));
  table.tBodies[0].replaceChildren();
  ["a", "b"].forEach((name, at) => {
    document.getElementById(`head-${name}`).textContent = pair[at].id;
  });
  for (const [name, of] of facts) line(name, ...pair.map(of));
  const classes = new Set(pair.flatMap((it) => Object.keys(it.failure_classes)));
  for (const name of [...classes].sort()) {
    line(`failure cases: ${name}`, ...pair.map((it) => (it.failures === null ? "not measured" : or(it.failure_classes[name], "0"))));
  }
  const asked = new Map(pair.flatMap((it) => it.scores.map((s) => [`${s.name}\n${s.on}`, s])));
  for (const [key, of] of asked) {
    line(`${of.name}, ${of.on}`, ...pair.map((it) => score(it.scores.find((s) => `${s.name}\n${s.on}` === key))));
  }
  const [a, b] = pair;
  let told = "";
  if (a === b) told = "Both are the same version.";
  else if (a.rows_sha256 && b.rows_sha256 && a.rows_sha256 !== b.rows_sha256) {
    told = "They were measured on different rows: their scores and failure cases cannot be held against each other.";
  }
  document.getElementById("told").textContent = told;
  history.replaceState(null, "", `#${choices.map((choice) => encodeURIComponent(choice.value)).join("&")}`);
};

const decode = (text) => {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
};

const choose = () => {
  const named = location.hash.slice(1).split("&").map(decode);
  choices.forEach((choice, at) => {
    if (byId.has(named[at])) choice.value = named[at];
    else choice.selectedIndex = Math.min(at, choice.length - 1);
  });
  compare();
};

if (releases.length) {
  document.getElementById("choice").hidden = false;
  table.closest(".scroll").hidden = false;
  for (const choice of choices) choice.addEventListener("change", compare);
  window.addEventListener("hashchange", choose);
  choose();
} else document.getElementById("told").textContent = "There is nothing to compare.";
