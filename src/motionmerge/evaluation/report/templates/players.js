"use strict";
// One clock moves all players. A scene lasts as long as its longest video; a shorter one waits at
// its last frame. Only scenes that can be seen are played.
const scenes = [...document.querySelectorAll(".scene")].map(element => ({
  element, videos: [...element.querySelectorAll("video")], seen: false,
}));
const play = document.getElementById("play"), time = document.getElementById("time");
const slow = document.getElementById("slow");
const APART = 0.09; // seconds that a player may be off before it is set
const STEP = 0.125; // seconds of an arrow key: what is measured are about eight frames a second
let playing = false, clock = 0, before = 0;

const length = scene => Math.max(0.01, ...scene.videos.map(video => video.duration || 0));
const first = () => scenes.find(scene => scene.seen && scene.videos.length) || scenes[0];

function place(scene, at) {
  for (const video of scene.videos) {
    if (!video.duration) continue;
    const wanted = Math.min(at, video.duration - 0.001), waits = at >= video.duration;
    video.playbackRate = slow.checked ? 0.5 : 1;
    if (Math.abs(video.currentTime - wanted) > (playing ? APART : 0.001)) video.currentTime = wanted;
    if (playing && scene.seen && !waits) { if (video.paused) video.play().catch(() => {}); }
    else if (!video.paused) video.pause();
  }
}
function step(now) {
  if (!playing) return;
  clock += (now - before) / 1000 * (slow.checked ? 0.5 : 1);
  before = now;
  for (const scene of scenes) if (scene.seen) place(scene, clock % length(scene));
  const lead = first();
  if (lead) time.value = 1000 * (clock % length(lead)) / length(lead);
  requestAnimationFrame(step);
}
function set(wanted) {
  playing = wanted;
  play.textContent = playing ? "Pause" : "Play";
  if (playing) { before = performance.now(); requestAnimationFrame(step); }
  else for (const scene of scenes) for (const video of scene.videos) video.pause();
}
function seek(share) {
  set(false);
  for (const scene of scenes) place(scene, share * length(scene));
  if (first()) clock = share * length(first());
}
if (play) {
  const watcher = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const scene = scenes.find(one => one.element === entry.target);
      scene.seen = entry.isIntersecting;
      if (!scene.seen) for (const video of scene.videos) video.pause();
    }
  }, { rootMargin: "20%" });
  for (const scene of scenes) watcher.observe(scene.element);
  play.addEventListener("click", () => set(!playing));
  time.addEventListener("input", () => seek(time.value / 1000));
  time.addEventListener("keydown", event => {
    const way = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!way || !first()) return;
    event.preventDefault();
    time.value = Number(time.value) + 1000 * way * STEP / length(first());
    seek(time.value / 1000);
  });
  document.addEventListener("keydown", event => {
    if (event.key === " " && event.target === document.body) { event.preventDefault(); set(!playing); }
  });
  set(!matchMedia("(prefers-reduced-motion: reduce)").matches);
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), column = head.cellIndex;
    const rises = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rises ? "ascending" : "descending");
    const value = row => {
      const text = row.cells[column].dataset.value;
      return column === 0 ? text : text === "" ? NaN : Number(text);
    };
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (column === 0) return rises ? x.localeCompare(y) : y.localeCompare(x);
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what is missing comes last
      return rises ? x - y : y - x;
    });
    table.tBodies[0].append(...rows);
  });
}
