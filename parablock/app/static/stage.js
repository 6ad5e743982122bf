// The stage shows one answer (or two, in a race) as it is denoised, and plays it again. It receives the recorded events
// as JSON in `props.value` and needs nothing else from the server.
const find = (name) => element.querySelector(name);
const stage = find(".pb-stage");
const scrub = find(".pb-scrub");
let value = null; // what the page last received
let lanes = []; // per answer: its data and its elements
let moments = []; // the times at which anything changes, over all answers
let clock = 0; // the recorded second that is shown
let playing = false;
let pace = 1; // how many times slower than recorded
let chosenPace = null; // by the user; stays for the next question
let colour = "confidence";
let chosenColour = null; // by the user, the same
let before = null; // the time of the last animation frame

const make = (tag, name, text) => {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
};

// ---- where the replay stands -----------------------------------------------------------------------------------------

const lastMoment = () => (moments.length ? moments[moments.length - 1] : 0);
const frameAt = (time) => moments.filter((t) => t <= time).length - 1;
const isOver = () => value.state !== "running" && clock >= lastMoment();

// ---- colours ------------------------------------------------------------------------------------------------------

/** The hue of a token: orange to green with its confidence, violet over blue and green to yellow with its forward. */
function hueOf(cell, forwards) {
  if (cell.draft || colour === "drafts") return null;
  if (colour === "order") return 300 - 205 * (forwards > 1 ? (cell.forward - 1) / (forwards - 1) : 0);
  if (cell.confidence === null || cell.confidence === undefined) return null;
  return 35 + 120 * Math.min(1, -Math.log10(Math.max(0.001, 1 - cell.confidence)) / 3); // by the nines, up to 99.9 %
}

// ---- drawing ------------------------------------------------------------------------------------------------------

function drawCell(node, cell, forwards) {
  const key = cell.masked ? "mask" : `${cell.forward}:${cell.fresh}:${cell.draft}:${colour}:${forwards}:${cell.text}`;
  if (node.dataset.key === key) return;
  node.dataset.key = key;
  if (cell.masked) {
    node.className = "pb-mask";
    node.textContent = "";
    node.removeAttribute("title");
    return;
  }
  const hue = hueOf(cell, forwards);
  const shown = cell.text.replace(/\n/g, "↵\n");
  const kind = cell.draft ? ` pb-${cell.draft}` : colour === "drafts" && cell.accepted ? " pb-accepted" : hue === null ? " pb-plain" : "";
  node.className = "pb-token" + kind + (cell.fresh ? " pb-fresh" : "") + (shown ? "" : " pb-end");
  node.style.setProperty("--h", hue ?? (cell.accepted ? 150 : 275));
  const [, lead, core, tail] = shown.match(/^(\s*)([^]*?)(\s*)$/);
  node.replaceChildren(lead, make("b", "", core), tail);
  const sure = cell.confidence === null || cell.confidence === undefined ? "" : `, confidence ${cell.confidence.toFixed(3)}`;
  const origin = cell.draft === "draft" ? "a draft after " : cell.draft ? "a draft that was refused by " : cell.accepted ? "a draft accepted by " : "";
  node.title = `${origin}forward ${cell.forward}${sure}${shown ? "" : ", end of the answer"}`;
}

function drawLane(lane) {
  const { data, nodes } = lane;
  const count = countAt(data, clock);
  const cells = cellsAfter(data, count);
  const event = count ? data.events[count - 1] : null;
  const forwards = data.events.length ? data.events[data.events.length - 1].f : 1;
  while (lane.tokens.length < cells.length) lane.tokens.push(nodes.text.appendChild(make("span")));
  while (lane.tokens.length > cells.length) lane.tokens.pop().remove();
  cells.forEach((cell, i) => drawCell(lane.tokens[i], cell, forwards));
  const over = data.done && count === data.events.length;
  const known = cells.filter((cell) => !cell.masked && !cell.draft).length;
  nodes.forward.textContent = event ? `forward ${event.f}` + (over ? "" : ` · ${known} tokens`) : "waiting";
  nodes.root.dataset.state = data.error ? "failed" : over ? "done" : isOver() ? "stopped" : "running";
  nodes.copy.hidden = !data.text; // until the answer has ended
  nodes.error.textContent = data.error ?? "";
  nodes.error.hidden = !data.error;
  const figures = over ? data.figures ?? {} : event ? figuresSoFar(event, known) : {};
  const show = (name, text) => (nodes[name].textContent = text ?? "–");
  show("speed", figures.tokens_per_second && Math.round(figures.tokens_per_second).toLocaleString("en"));
  show("width", figures.tokens_per_forward?.toFixed(1));
  show("first", (data.figures ?? figures).ttft && event && seconds((data.figures ?? figures).ttft));
  show("count", event && String(figures.forwards ?? event.f));
  if (data.speculative) show("right", event?.counts && `${event.counts[1]} of ${event.counts[0]}`);
}

/** While an answer is not whole; the server's own figures come with its end. */
const figuresSoFar = (event, known) => ({
  tokens_per_second: known / event.t,
  tokens_per_forward: known / Math.max(1, event.f),
  forwards: event.f,
});

const seconds = (t) => (t < 0.9995 ? `${Math.round(1000 * t)} ms` : `${t.toFixed(t < 10 ? 2 : 1)} s`);

function draw() {
  lanes.forEach(drawLane);
  const frame = frameAt(clock);
  scrub.max = Math.max(0, moments.length - 1);
  scrub.value = Math.max(0, frame);
  scrub.style.setProperty("--done", `${moments.length > 1 ? (100 * Math.max(0, frame)) / (moments.length - 1) : 0}%`);
  find(".pb-clock").textContent = moments.length ? `${Math.max(0, frame + 1)}/${moments.length} · ${seconds(Math.max(0, Math.min(clock, lastMoment())))}` : "";
  stage.dataset.playing = playing;
  const play = find(".pb-play");
  play.title = playing ? "Pause" : "Play";
  play.setAttribute("aria-label", play.title);
  const verdict = find(".pb-verdict");
  verdict.hidden = !(value.verdict && isOver());
  if (!verdict.hidden) drawVerdict(verdict);
}

function drawVerdict(node) {
  const { fast, slow, seconds: spent } = value.verdict;
  const times = `${value.verdict.times.toFixed(1)}×`;
  node.replaceChildren(make("strong", "", times), make("span", "", `${fast} was ${times} as fast as ${slow.toLowerCase()} decoding`));
  if (value.verdict.texts) {
    const line = node.appendChild(make("div", "pb-texts", value.verdict.texts.words));
    line.dataset.equal = value.verdict.texts.equal;
  }
  const bars = node.appendChild(make("div", "pb-bars"));
  lanes.forEach(({ data }, i) => {
    const row = bars.appendChild(make("div", "pb-bar"));
    row.append(make("span", "", data.title), make("i"), make("span", "", seconds(spent[i])));
    row.children[1].style.setProperty("--share", spent[i] / Math.max(...spent));
    row.dataset.fast = data.title === fast;
  });
}

// ---- building: once per question ----------------------------------------------------------------------------------

function buildLane(data) {
  const lane = { data, tokens: [] };
  const root = make("section", "pb-lane");
  const head = root.appendChild(make("header"));
  const forward = make("span", "pb-forward");
  const copy = copyButton(data.title, () => lane.data.text);
  head.append(make("h3", "", data.title), forward, copy);
  root.append(make("div", "pb-text"), make("div", "pb-alert"), make("dl", "pb-figures"));
  const figures = root.querySelector(".pb-figures");
  const nodes = { root, forward, copy, text: root.querySelector(".pb-text"), error: root.querySelector(".pb-alert") };
  lane.nodes = nodes;
  const tiles = [["speed", "tokens/s"], ["width", "tokens/forward"], ["first", "first token"], ["count", "forwards"]];
  if (data.speculative) tiles.push(["right", "drafts accepted"]);
  for (const [name, label] of tiles) {
    const tile = figures.appendChild(make("div"));
    nodes[name] = tile.appendChild(make("dd", "pb-" + name, "–"));
    tile.appendChild(make("dt", "", label));
  }
  return lane;
}

function buildTurn({ question, answer }, i) {
  const told = make("div", "pb-answer");
  told.append(make("span", "", answer), copyButton(`Answer ${i + 1}`, () => answer));
  return [make("div", "pb-question", question), told];
}

/** A growing answer comes with its latest events only: they continue those that are here. */
function joined(old, data) {
  if (data.since > old.events.length) return { ...data, events: old.events }; // some are missing; the end brings all
  return { ...data, events: [...old.events.slice(0, data.since), ...data.events] };
}

function receive() {
  if (!props.value) return;
  const next = JSON.parse(props.value);
  if (value && next.run < value.run) return; // it was overtaken
  const fresh = !value || value.run !== next.run;
  value = next;
  stage.dataset.state = value.state;
  if (value.kept) keep(value.store, value.kept);
  find(".pb-empty").hidden = value.lanes.length > 0 || value.turns.length > 0 || Boolean(value.message);
  const alert = find(".pb-alert");
  alert.hidden = !value.message;
  alert.textContent = value.message ?? "";
  const question = find(".pb-question");
  question.hidden = !value.question;
  question.textContent = value.question ?? "";
  find(".pb-player").hidden = !value.lanes.length;
  if (fresh) {
    find(".pb-turns").replaceChildren(...value.turns.flatMap(buildTurn));
    lanes = value.lanes.map(buildLane);
    find(".pb-lanes").replaceChildren(...lanes.map((lane) => lane.nodes.root));
    find(".pb-lanes").dataset.count = lanes.length;
    const speculative = value.lanes.some((lane) => lane.speculative);
    find(".pb-masked").hidden = speculative;
    find('[data-colour="drafts"]').hidden = !speculative;
    if (lanes.length) setColour(chosenColour ?? (speculative ? "drafts" : "confidence"));
    setPace(chosenPace ?? value.pace);
    clock = 0;
    if (value.lanes.length) start();
  }
  lanes.forEach((lane, i) => (lane.data = joined(lane.data, value.lanes[i])));
  moments = [...new Set(lanes.flatMap(({ data }) => data.events.map((event) => event.t)))].sort((a, b) => a - b);
  draw();
}

// ---- playing ------------------------------------------------------------------------------------------------------

function tick(now) {
  if (!playing) return;
  clock += (now - (before ?? now)) / 1000 / pace;
  before = now;
  if (value.state === "running") clock = pace === 1 ? lastMoment() : Math.min(clock, Math.max(lastMoment(), 0.001));
  else if (clock >= lastMoment()) {
    clock = lastMoment();
    playing = false;
  }
  draw();
  requestAnimationFrame(tick);
}

function start() {
  before = null;
  if (!playing) {
    playing = true;
    requestAnimationFrame(tick);
  }
}

function show(frame) {
  playing = false;
  clock = moments[Math.max(0, Math.min(frame, moments.length - 1))] ?? 0;
  draw();
}

function setColour(name) {
  colour = name;
  element.querySelectorAll("[data-colour]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.colour === colour));
  element.querySelectorAll("[data-scale]").forEach((s) => (s.hidden = s.dataset.scale !== colour));
}

function setPace(slower) {
  pace = Number(slower);
  find(".pb-pace").value = String(pace);
}

const actions = {
  first: () => show(0),
  back: () => show(frameAt(clock) - 1),
  forth: () => show(frameAt(clock) + 1),
  play: () => {
    if (playing) playing = false;
    else {
      if (isOver()) clock = 0;
      start();
    }
    draw();
  },
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !value) return;
  if (button.dataset.do) actions[button.dataset.do]();
  if (button.dataset.colour) {
    setColour((chosenColour = button.dataset.colour));
    draw();
  }
});
scrub.addEventListener("input", () => show(Number(scrub.value)));
find(".pb-pace").addEventListener("change", (event) => {
  chosenPace = Number(event.target.value);
  setPace(chosenPace);
});
watch("value", receive);
receive();
