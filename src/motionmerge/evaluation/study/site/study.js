"use strict";
// Everything that a rater does is kept in the browser first, and then sent if there is a server:
// closing the page, a lost connection or a second click loses and doubles nothing.
const study = window.STUDY, page = id => document.getElementById(id);
const KEY = "motionmerge-study-" + study.id;
const CHOICES = { left: "Left", tie: "About the same", right: "Right", cannot: "Cannot judge" };
const RETRY = 15000; // milliseconds

// A small generator (mulberry32): the same rater sees the same order after a reload.
function generator(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}
function shuffled(list, draw) {
  const result = [...list];
  for (let last = result.length - 1; last > 0; last--) {
    const other = Math.floor(draw() * (last + 1));
    [result[last], result[other]] = [result[other], result[last]];
  }
  return result;
}

// What is kept: rater, form, answers, and which of them a server has.
const forms = 1 + Math.max(...study.tasks.map(task => task.form));
let state = null, tasks = [], keeps = true;
const answerTo = (task, repeat) => state.answers.find(one => one.task === task && one.repeat === repeat);
function adopt(found) { state = found; tasks = planned(); }
function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    const whole = /^[0-9a-f]{32}$/.test(found.rater) && Array.isArray(found.answers) && found.form < forms;
    return whole ? found : null;
  } catch { return null; }
}
function newRater() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const rater = [...bytes].map(one => one.toString(16).padStart(2, "0")).join("");
  const wanted = Number(new URLSearchParams(location.search).get("form")); // from 1
  const form = Number.isInteger(wanted) && wanted >= 1 && wanted <= forms
    ? wanted - 1 : crypto.getRandomValues(new Uint32Array(1))[0] % forms;
  return { rater, form, begun: false, answers: [] };
}
// Two tabs of one browser are one rater, and a page that the back button brings is an old one:
// each takes over what the other knows before it writes.
function join() {
  const other = kept();
  if (!other) return;
  if (other.rater !== state.rater) { if (!state.answers.length) adopt(other); return; }
  state.begun ||= other.begun;
  state.answers.push(...other.answers.filter(one => !answerTo(one.task, one.repeat)));
}
function keep() {
  join();
  try { localStorage.setItem(KEY, JSON.stringify(state)); }
  catch { keeps = false; warn(""); }
}
function warn(text) {
  const shown = text || (keeps ? "" : "This browser keeps nothing: finish without closing the page, and save your answers at the end.");
  page("trouble").textContent = shown;
  page("trouble").hidden = !shown;
}

// The order: the form shuffled; then some pairs of its first third once more, swapped, in its last.
// Checks, which show one video twice, are not repeated: nothing is learnt from that.
function planned() {
  const draw = generator(parseInt(state.rater.slice(0, 8), 16));
  const swapped = draw() < 0.5; // for all alike: the manifest is balanced, and so is its mirror image
  const order = shuffled(study.tasks.filter(task => task.form === state.form), draw)
    .map(task => ({ task, repeat: false, swapped }));
  const pairs = order.filter(({ task }) => task.first !== task.second);
  const early = pairs.slice(0, Math.max(Math.ceil(pairs.length / 3), study.num_repeats));
  const again = shuffled(early, draw).slice(0, study.num_repeats);
  const last = Math.max(order.indexOf(early.at(-1)) + 1, Math.ceil(order.length * 2 / 3));
  const tail = order.splice(last); // whatever is repeated has been shown before
  const repeats = again.map(({ task }) => ({ task, repeat: true, swapped: !swapped }));
  return [...order, ...shuffled([...tail, ...repeats], draw)];
}

adopt(kept() || newRater());
let current = null, started = 0, ended = new Set();
const left = page("left"), right = page("right"), form = page("questions");
const given = item => answerTo(item.task.id, item.repeat);

function show() {
  const at = tasks.findIndex(item => !given(item));
  for (const name of ["welcome", "task", "done"]) page(name).hidden = true;
  if (!state.begun) {
    page("welcome").querySelector("h1").textContent = study.title;
    page("count").textContent = tasks.length;
    page("welcome").hidden = false;
    return;
  }
  if (at < 0) { page("done").hidden = false; tellSent(); return; }
  current = tasks[at];
  const { task, swapped } = current;
  page("progress").value = at / tasks.length;
  page("where").textContent = `${at + 1} of ${tasks.length}`;
  page("prompt").textContent = task.prompt ? `“${task.prompt}”` : "";
  page("photo").hidden = !task.photo;
  if (task.photo) page("photo").src = "files/" + task.photo;
  ended = new Set();
  left.src = "files/" + (swapped ? task.second : task.first);
  right.src = "files/" + (swapped ? task.first : task.second);
  started = performance.now();
  ask();
  page("task").hidden = false;
  page("play").textContent = "Play both";
  page("play").focus({ preventScroll: true });
  scrollTo(0, 0);
}
function ask() {
  form.replaceChildren(...Object.entries(study.questions).map(([name, text]) => {
    const set = document.createElement("fieldset"), legend = document.createElement("legend");
    const row = document.createElement("div");
    set.disabled = true;
    legend.textContent = text;
    row.className = "choices";
    for (const [value, words] of Object.entries(CHOICES)) {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name, value });
      label.append(input, words);
      row.append(label);
    }
    set.append(legend, row);
    return set;
  }));
  page("hint").textContent = "Play both videos to their end to answer.";
  unlock();
}
const choices = () => Object.fromEntries(new FormData(form));
function unlock() {
  const seen = ended.size === 2;
  for (const set of form.querySelectorAll("fieldset")) set.disabled = !seen;
  if (seen) page("hint").textContent = "You can play them again as often as you like.";
  page("next").disabled = !seen || Object.keys(choices()).length < Object.keys(study.questions).length;
}
for (const video of [left, right]) {
  video.addEventListener("ended", () => {
    ended.add(video);
    if (left.ended && right.ended) { page("play").textContent = "Play again"; }
    unlock();
  });
  video.addEventListener("loadedmetadata", () =>
    video.style.setProperty("--shape", `${video.videoWidth} / ${video.videoHeight}`));
  video.addEventListener("error", () => {
    if (video.getAttribute("src")) warn("A video could not be loaded. Check the connection, then reload this page: your answers are kept.");
  });
}
page("play").addEventListener("click", async () => {
  warn("");
  for (const video of [left, right]) {
    if (video.error) video.load();
    video.currentTime = 0;
  }
  await Promise.all([left.play(), right.play()].map(one => one.catch(() => {})));
});
form.addEventListener("change", unlock);
form.addEventListener("submit", event => event.preventDefault());
page("begin").addEventListener("click", () => { state.begun = true; keep(); show(); });
page("next").addEventListener("click", () => {
  if (page("next").disabled || !current || given(current)) return; // a second click
  state.answers.push({
    study: study.id, rater: state.rater, task: current.task.id, repeat: current.repeat,
    swapped: current.swapped, choices: choices(),
    seconds: Math.round(Math.min(86400, (performance.now() - started) / 1000) * 10) / 10,
    place: state.answers.length,
  });
  keep();
  show();
  send();
});
function refresh() {
  join();
  if (!current || given(current)) show();
}
addEventListener("storage", event => { if (event.key === KEY) refresh(); });
addEventListener("pageshow", event => { if (event.persisted) refresh(); });

let sending = false, timer = 0;
const unsent = () => state.answers.filter(one => !one.sent && !one.refused);
async function send() {
  if (!window.STUDY_SERVER || sending) return;
  sending = true;
  try {
    for (let answer = unsent()[0]; answer; answer = unsent()[0]) {
      const { sent, refused, ...body } = answer;
      const reply = await fetch("answers", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
        signal: AbortSignal.timeout(RETRY),
      });
      if (reply.ok) answer.sent = true;
      else if (reply.status === 400) answer.refused = true; // it is of another study
      else break; // busy, its disk is full, or somebody in between answers: later
      keep();
    }
  } catch { /* no connection: later */ }
  sending = false;
  tellSent();
  clearTimeout(timer);
  if (unsent().length) timer = setTimeout(send, RETRY);
}
function tellSent() {
  const open = unsent().length, refused = state.answers.filter(one => one.refused).length;
  page("sent").textContent = !window.STUDY_SERVER
    ? "Save your answers as a file, and send it to whoever asked you."
    : refused ? `Answers that were not taken: ${refused}. Save your answers as a file, and send it to whoever asked you.`
    : open ? `Answers that are not sent yet: ${open}. They are kept here and sent when there is a connection; you can also save them as a file.`
    : "All answers are sent. You can close this page.";
}
page("export").addEventListener("click", () => {
  const lines = state.answers.map(({ sent, refused, ...answer }) => JSON.stringify(answer) + "\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.download = `answers-${state.rater.slice(0, 8)}.jsonl`;
  link.click();
  URL.revokeObjectURL(link.href);
});
addEventListener("online", send);
document.title = study.title;
show();
send();
