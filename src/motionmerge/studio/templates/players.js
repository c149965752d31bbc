// One clock moves the videos of a work, however often the page replaces them.
(() => {
  const APART = 0.09; // seconds that a player may be off before it is set
  const clocks = new WeakMap();
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const parts = work => ({ videos: [...work.querySelectorAll("video")], time: work.querySelector(".mm-time"), play: work.querySelector(".mm-play") });
  const state = work => {
    if (!clocks.has(work)) clocks.set(work, { clock: 0, playing: !still, before: performance.now() });
    return clocks.get(work);
  };
  function place(work, own) {
    const { videos, time, play } = parts(work);
    const length = Math.max(0.01, ...videos.map(one => one.duration || 0));
    own.clock %= length;
    for (const video of videos) {
      if (!video.duration) continue;
      const wanted = Math.min(own.clock, video.duration - 0.001), waits = own.clock >= video.duration;
      if (Math.abs(video.currentTime - wanted) > (own.playing ? APART : 0.001)) video.currentTime = wanted;
      if (own.playing && !waits) { if (video.paused) video.play().catch(() => {}); } else if (!video.paused) video.pause();
    }
    if (own.playing) time.value = 1000 * own.clock / length;
    play.textContent = own.playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", own.playing);
  }
  function step(now) {
    for (const work of document.querySelectorAll(".mm-work")) {
      const own = state(work);
      if (own.playing) own.clock += Math.min(0.25, (now - own.before) / 1000);
      own.before = now;
      if (work.offsetParent) place(work, own);
    }
    requestAnimationFrame(step);
  }
  requestAnimationFrame(step);
  document.addEventListener("click", event => {
    const work = event.target.closest?.(".mm-play")?.closest(".mm-work");
    if (work) state(work).playing = !state(work).playing;
  });
  document.addEventListener("input", event => {
    if (!event.target.matches?.(".mm-time")) return;
    const work = event.target.closest(".mm-work"), own = state(work);
    own.playing = false;
    own.clock = event.target.value / 1000 * Math.max(0.01, ...parts(work).videos.map(one => one.duration || 0)) * 0.9999;
  });
})();
