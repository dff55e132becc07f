"use strict";
// Draws one stage at a time: a list of lines of equal height, of which only those in sight are in the document.
const data = JSON.parse(document.getElementById("data").textContent);
const [SAME, ADDED, REMOVED, CHANGED, MOVED, LEFT] = [0, 1, 2, 3, 4, 5];
const CLASSES = ["", "added", "removed", "changed", "moved", "left"];
const SIGNS = ["", "+", "−", "~", "↕", "↕"];
const SAID = [
  "as before", "added by this pass", "removed by this pass", "changed by this pass", "moved here by this pass",
  "stood here before this pass, which moved it",
];
const [COLLECTIVE, WAIT, INPUT, RESULT] = [1, 2, 3, 4];
const HEIGHT = 20, AROUND = 30, CONTEXT = 2;
const byId = (id) => document.getElementById(id);
const list = byId("lines"), seen = byId("seen"), room = byId("room"), outline = byId("outline"), about = byId("about");
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
const node = (row) => {
  const [name, args, kind, backward, target, value, module] = data.nodes[row];
  const text = (index) => data.strings[index];
  return { name, args, kind, backward, target: text(target), value: text(value), module: text(module), reads: data.reads[row] };
};

let stage = 0, lines = [], rows = [], parts = [], rowOf = new Map(), readers = new Map(), readersBefore = new Map(), chosen = null, hits = [], hit = -1;
const closed = new Set();

// the parts of a stage

const partOf = (one) => {
  if (one.kind === INPUT) return "inputs";
  if (one.kind === RESULT) return "results";
  if (!one.module) return null;
  const block = /^(?:.*?\.)?\d+(?=\.|$)/.exec(one.module);
  return (block ? block[0] : one.module) + (one.backward ? " ← backward" : " → forward");
};

const read = () => {
  const flat = data.stages[stage].lines;
  lines = [];
  parts = [];
  readers = new Map();
  readersBefore = new Map();
  for (let at = 0; at < flat.length; at += 2) {
    const line = { one: node(flat[at]), row: flat[at], kind: flat[at + 1], place: lines.length };
    const part = partOf(line.one) ?? (parts.length ? parts[parts.length - 1].name : "the rest");
    if (!parts.length || parts[parts.length - 1].name !== part) parts.push({ name: part, lines: [], sums: [0, 0, 0, 0, 0, 0] });
    line.part = parts[parts.length - 1];
    line.part.lines.push(line);
    line.part.sums[line.kind] += 1;
    lines.push(line);
    const found = line.kind === REMOVED || line.kind === LEFT ? readersBefore : readers;
    for (const name of line.one.reads) found.set(name, [...(found.get(name) ?? []), line.one.name]);
  }
};

const layOut = () => {
  const only = byId("only").checked;
  rows = [];
  rowOf = new Map();
  for (const part of parts) {
    part.at = part.end = undefined;
    const changes = part.lines.length - part.sums[SAME];
    if (only && !changes) continue;
    part.at = rows.length;
    rows.push({ part });
    part.end = rows.length;
    if (closed.has(part.name)) continue;
    const near = only ? nearChanges(part.lines) : null;
    let hidden = 0;
    const gap = (first) => { if (hidden) rows.push({ gap: hidden, line: first }); hidden = 0; };
    part.lines.forEach((line, index) => {
      if (near && !near[index]) { hidden += 1; return; }
      gap(line);
      rowOf.set(line.place, rows.length);
      rows.push({ line });
    });
    gap(part.lines[part.lines.length - 1]);
    part.end = rows.length;
  }
  room.style.height = `${rows.length * HEIGHT}px`;
  draw();
};

const nearChanges = (some) => {
  const near = new Array(some.length).fill(false);
  some.forEach((line, index) => {
    if (line.kind === SAME && line !== chosen) return;
    for (let at = Math.max(0, index - CONTEXT); at <= Math.min(some.length - 1, index + CONTEXT); at += 1) near[at] = true;
  });
  return near;
};

// drawing

const sums = (counts) => {
  const told = make("span", "sums");
  [[ADDED, "+"], [REMOVED, "−"], [CHANGED, "~"], [MOVED, "↕"]].forEach(([kind, sign]) => {
    if (counts[kind]) told.append(make("b", CLASSES[kind], `${sign}${counts[kind].toLocaleString("en")}`));
  });
  return told;
};

const drawRow = (row) => {
  if (row.part) {
    const isClosed = closed.has(row.part.name);
    const made = make("div", "row part");
    made.append(make("span", "sign", isClosed ? "▸" : "▾"), row.part.name);
    const told = sums(row.part.sums);
    told.prepend(make("span", "", `${row.part.lines.length.toLocaleString("en")} nodes `));
    made.append(told);
    made.onclick = () => { if (isClosed) closed.delete(row.part.name); else closed.add(row.part.name); layOut(); };
    return made;
  }
  if (row.gap) {
    const made = make("div", "row gap");
    made.append(make("span", "sign", "⋯"), `${row.gap.toLocaleString("en")} unchanged`);
    made.onclick = () => { byId("only").checked = false; layOut(); goTo(row.line.place, false); };
    return made;
  }
  const { one, kind } = row.line;
  const made = make("div", `row ${CLASSES[kind]}`);
  if (chosen) {
    if (row.line === chosen) made.classList.add("chosen");
    else if (chosen.one.reads.includes(one.name)) made.classList.add("reads");
    else if (one.reads.includes(chosen.one.name)) made.classList.add("readby");
  }
  if (hits.length && hits.includes(row.line.place)) made.classList.add("hit");
  const text = make("span", "text");
  const called = make("span", one.kind === COLLECTIVE ? "collective" : one.kind === WAIT ? "wait" : "", one.target);
  if (one.kind === INPUT) text.append(make("span", "name", one.name), ` ← ${one.args} `);
  else text.append(make("span", "name", one.name), " = ", called, `(${one.args}) `);
  text.append(make("span", "value", one.value));
  made.append(make("span", "sign", SIGNS[kind]), text, make("span", "module", one.module));
  made.title = `${one.name} = ${one.target}(${one.args}) ${one.value}\n${SAID[kind]}`;
  made.onclick = () => choose(row.line);
  return made;
};

let drawn = "";
const draw = (always = true) => {
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - AROUND);
  const last = Math.min(rows.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + AROUND);
  if (!always && drawn === `${first}`) return;
  drawn = `${first}`;
  seen.style.transform = `translateY(${first * HEIGHT}px)`;
  seen.replaceChildren(...rows.slice(first, last).map(drawRow));
  const top = Math.floor(list.scrollTop / HEIGHT);
  [...outline.children].forEach((button) => {
    const part = button.shows, end = part.end;
    button.classList.toggle("here", part.at !== undefined && part.at <= top && top < end);
  });
};

const drawOutline = () => {
  outline.replaceChildren(...parts.map((part) => {
    const button = make("button");
    button.shows = part;
    const [module, phase] = part.name.split(/ (?=[→←])/);
    button.append(make("span", "", module.replace(/^model\./, "")), make("span", "soft", phase ? phase[0] : ""), sums(part.sums));
    button.title = `${part.name}: ${part.lines.length} nodes`;
    button.onclick = () => { if (part.at === undefined) { byId("only").checked = false; layOut(); } scrollTo(part.at, 0); };
    return button;
  }));
};

const drawStages = () => {
  byId("stages").replaceChildren(...data.stages.flatMap((one, index) => {
    const button = make("button");
    button.setAttribute("aria-pressed", String(index === stage));
    button.append(make("span", "", index ? `${index}. ${one.name}` : one.name));
    const told = make("span", "sums");
    const [added, removed, changed, moved] = one.changes;
    told.append(`${one.counts.nodes.toLocaleString("en")} nodes `, sums([0, added, removed, changed, moved, 0]));
    const before = index ? data.stages[index - 1].counts : one.counts;
    const different = Object.keys({ ...before, ...one.counts }).filter((key) => key !== "nodes" && before[key] !== one.counts[key]);
    button.append(told, make("span", "sums", different.map((key) => `${key} ${before[key] ?? 0} → ${one.counts[key] ?? 0}`).join(", ")));
    button.title = `${one.name}\n${Object.entries(one.counts).map(([key, count]) => `${key} ${count}`).join("\n")}`;
    button.onclick = () => show(index);
    return index ? [make("span", "arrow", "→"), button] : [button];
  }));
};

// going somewhere

const scrollTo = (row, share = 0.35) => { list.scrollTop = Math.max(0, row * HEIGHT - share * list.clientHeight); draw(); };

const goTo = (place, isChosen = true) => {
  const line = lines[place];
  if (isChosen) chosen = line;
  if (closed.delete(line.part.name) || !rowOf.has(place)) layOut();
  if (!rowOf.has(place)) { byId("only").checked = false; layOut(); }
  scrollTo(rowOf.get(place));
  if (isChosen) tell();
};

const placeOf = (name, isBefore = false) => {
  const found = lines.filter((line) => line.one.name === name);
  return (found.find((line) => (line.kind === REMOVED || line.kind === LEFT) === isBefore) ?? found[0])?.place;
};

const link = (name, isBefore = false) => {
  const place = placeOf(name, isBefore), made = make("a", "", name);
  if (place === undefined) return make("span", "soft", name);
  const line = lines[place];
  made.onclick = () => goTo(place);
  made.title = `${line.one.target} ${line.one.value}`;
  const item = make("li");
  const away = chosen ? place - chosen.place : 0;
  item.append(made, make("span", "soft", ` ${line.one.target} ${line.one.value}${Math.abs(away) > 20 ? `, ${Math.abs(away).toLocaleString("en")} lines ${away > 0 ? "below" : "above"}` : ""}`));
  return item;
};

const linked = (title, names, isBefore) => {
  if (!names.length) return [];
  const made = make("ul");
  made.append(...names.slice(0, 200).map((name) => link(name, isBefore)));
  return [make("h3", "", title), made];
};

const readersOf = (line, name = line.one.name) => (isGone(line) ? readersBefore : readers).get(name) ?? [];
const isGone = (line) => line.kind === REMOVED || line.kind === LEFT;

const partners = (line) => {
  const { one } = line;
  if (one.kind === COLLECTIVE) {
    const several = readersOf(line).flatMap((name) => readersOf(line, name));
    const found = [...readersOf(line), ...several].filter((name) => lines[placeOf(name, isGone(line))]?.one.kind === WAIT);
    return ["its wait", [...new Set(found)]];
  }
  return one.kind === WAIT ? ["the collective it waits for", one.reads] : ["", []];
};

const choose = (line) => { chosen = line; tell(); draw(); };

const tell = () => {
  const { one, kind } = chosen, isBefore = isGone(chosen);
  const [title, names] = partners(chosen);
  about.replaceChildren(make("h2", "", one.name));
  const said = make("p");
  said.append(make("code", "", one.kind === INPUT ? one.args : `${one.target}(${one.args})`));
  about.append(said, make("p", "", one.value));
  if (one.module) about.append(make("p", "soft", `${one.module}${one.backward ? ", backward" : ""}`));
  if (kind !== SAME) about.append(make("p", "", SAID[kind]));
  if (kind === CHANGED) {
    const rest = stageNodes(stage - 1).get(one.name);
    if (rest) { const was = make("p", "soft"); was.append("before: ", make("code", "", `${rest.target}(${rest.args}) ${rest.value}`)); about.append(was); }
  }
  if (kind === MOVED || kind === LEFT) {
    const other = lines.find((line) => line.one.name === one.name && line !== chosen);
    if (other) about.append(...linked(kind === MOVED ? "where it stood" : "where it is now", [one.name], kind === MOVED));
  }
  about.append(...linked(title, names, isBefore), ...linked("reads", one.reads, isBefore), ...linked("is read by", readersOf(chosen), isBefore));
};

const stageNodes = (index) => {
  const flat = data.stages[index].lines, found = new Map();
  for (let at = 0; at < flat.length; at += 2) {
    if (flat[at + 1] !== REMOVED && flat[at + 1] !== LEFT) { const one = node(flat[at]); found.set(one.name, one); }
  }
  return found;
};

const show = (index) => {
  const top = rows.slice(Math.floor(list.scrollTop / HEIGHT)).find((row) => row.line)?.line;
  const name = chosen?.one.name, anchor = top?.one.name, isAtTop = list.scrollTop < HEIGHT;
  stage = Math.max(0, Math.min(data.stages.length - 1, index));
  read();
  const again = name === undefined ? undefined : placeOf(name);
  chosen = again === undefined ? null : lines[again];
  drawStages();
  drawOutline();
  find(false);
  layOut();
  const place = anchor === undefined || isAtTop ? undefined : placeOf(anchor);
  scrollTo(rowOf.get(place) ?? 0, 0);
  if (chosen) tell();
};

// finding

const find = (isGoing = true) => {
  const words = byId("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  hits = [];
  hit = -1;
  if (words.length) {
    for (const line of lines) {
      const { one } = line, text = `${one.name} ${one.target} ${one.module} ${one.kind === INPUT ? one.args : ""} ${one.backward ? "backward" : "forward"}`.toLowerCase();
      if (words.every((word) => text.includes(word))) hits.push(line.place);
    }
  }
  byId("hits").textContent = words.length ? (hits.length ? `${hits.length.toLocaleString("en")} found` : "none found") : "";
  if (isGoing && hits.length) step(1); else draw();
};

const step = (by) => {
  if (!hits.length) return;
  hit = (hit + by + hits.length) % hits.length;
  byId("hits").textContent = `${(hit + 1).toLocaleString("en")} of ${hits.length.toLocaleString("en")}`;
  goTo(hits[hit]);
};

const nextChange = (by) => {
  let at = (chosen ? chosen.place : rows[Math.floor(list.scrollTop / HEIGHT)]?.line?.place ?? -1) + by;
  while (at >= 0 && at < lines.length && lines[at].kind === SAME) at += by;
  if (at >= 0 && at < lines.length) goTo(at);
};

const jump = () => {
  const place = chosen && partners(chosen)[1].map((name) => placeOf(name, isGone(chosen))).find((found) => found !== undefined);
  if (place !== null && place !== undefined) goTo(place);
};

list.addEventListener("scroll", () => draw(false), { passive: true });
window.addEventListener("resize", () => draw());
byId("search").addEventListener("input", () => find());
byId("search").addEventListener("keydown", (event) => { if (event.key === "Enter") step(event.shiftKey ? -1 : 1); });
byId("next").onclick = () => step(1);
byId("previous").onclick = () => step(-1);
byId("only").addEventListener("change", () => { layOut(); scrollTo(chosen ? rowOf.get(chosen.place) ?? 0 : 0); });
byId("collapse").onclick = () => {
  const isOpen = parts.some((part) => !closed.has(part.name));
  closed.clear();
  if (isOpen) parts.forEach((part) => closed.add(part.name));
  byId("collapse").textContent = isOpen ? "open all parts" : "close all parts";
  layOut();
  scrollTo(0);
};
document.addEventListener("keydown", (event) => {
  if (event.target.type === "search") { if (event.key === "Escape") list.focus(); return; }
  const actions = {
    ArrowLeft: () => show(stage - 1), ArrowRight: () => show(stage + 1), n: () => nextChange(1), p: () => nextChange(-1), w: jump,
    "/": () => byId("search").focus(),
    ArrowDown: () => chosen && chosen.place + 1 < lines.length && goTo(chosen.place + 1),
    ArrowUp: () => chosen && chosen.place > 0 && goTo(chosen.place - 1),
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
});

// what an address asks for: graph.html#stage=1&find=layers.3&node=wait_tensor_4
const asked = new URLSearchParams(location.hash.slice(1));
show(Number(asked.get("stage") ?? Math.min(1, data.stages.length - 1)));
if (asked.has("only")) { byId("only").checked = true; layOut(); }
if (asked.has("closed")) byId("collapse").click();
if (asked.has("find")) { byId("search").value = asked.get("find"); find(); }
if (asked.has("node") && placeOf(asked.get("node")) !== undefined) goTo(placeOf(asked.get("node")));
if (asked.has("wait")) jump();
