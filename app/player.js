// Two clips under one clock: the dense one leads, the sparse one follows it. Gradio runs this once for the component
// and gives element, props and watch; the value's text enters the page by textContent alone.
const CLOSE_SECONDS = 0.01;
const FAR_SECONDS = 0.25; // beyond this a seek is quicker than running faster for a while

const [player, message, dense, sparse, sparseName, wipe, play, scrubber, number, loop] = [
  "player", "message", "dense", "sparse", "sparse-name", "wipe", "play", "scrubber", "number", "loop",
].map((name) => element.querySelector("." + name));

let frames = 1;
let changes = 0; // a change of the value outdates the loading of the one before
let ticking = false;
let wanted = !window.matchMedia("(prefers-reduced-motion: reduce)").matches; // does the visitor want it to play?

const address = (path) => (window.gradio_config?.root ?? "") + path;
const timeOf = (frame) => ((frame + 0.5) / frames) * dense.duration; // amid the frame, where rounding does no harm
const frameNow = () =>
  dense.duration > 0 ? Math.min(frames - 1, Math.floor((dense.currentTime / dense.duration) * frames)) : 0;

function seek(seconds) {
  dense.currentTime = seconds;
  sparse.currentTime = seconds;
  show();
}

function start() {
  // refused by the browser, or outrun by a new source: the button then says "Play"
  dense.play().catch(show);
}

function show() {
  const text = "frame " + (frameNow() + 1) + " of " + frames;
  scrubber.value = frameNow();
  scrubber.setAttribute("aria-valuetext", text);
  number.textContent = text;
  play.textContent = dense.paused && !(wanted && dense.ended && loop.checked) ? "Play" : "Pause";
}

function setWipe() {
  player.style.setProperty("--wipe", wipe.value + "%");
  wipe.setAttribute("aria-valuetext", wipe.value + " % dense, " + (100 - wipe.value) + " % sparse");
}

function follow() {
  if (dense.seeking || sparse.seeking) return;
  const late = dense.currentTime - sparse.currentTime;
  if (sparse.ended && Math.abs(late) < FAR_SECONDS) return; // a moment early: both start over together
  if (Math.abs(late) > FAR_SECONDS) sparse.currentTime = dense.currentTime;
  if (sparse.paused) sparse.play().catch(show);
  sparse.playbackRate = Math.abs(late) < CLOSE_SECONDS ? 1 : 1 + Math.max(-0.3, Math.min(0.3, 3 * late));
}

function tick() {
  ticking = !dense.paused && element.isConnected;
  if (!element.isConnected) dense.pause();
  if (!ticking) return;
  follow();
  show();
  requestAnimationFrame(tick);
}

function toggle() {
  if (frames === 1) return;
  wanted = dense.paused;
  if (wanted) {
    if (dense.ended) seek(0);
    start();
  } else {
    dense.pause();
    seek(timeOf(frameNow())); // both on the same frame
  }
}

function goTo(frame) {
  wanted = false;
  dense.pause();
  seek(timeOf(Math.max(0, Math.min(frames - 1, frame))));
}

function ready(video) {
  return new Promise((done, failed) => {
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) done();
    video.addEventListener("loadedmetadata", done, { once: true });
    video.addEventListener("error", failed, { once: true });
  });
}

function say(text) {
  player.dataset.state = "empty";
  message.textContent = text;
}

async function load() {
  const change = ++changes;
  const value = props.value;
  dense.pause();
  sparse.pause();
  if (!value) {
    say("No clip yet.");
    return;
  }
  // another plan for the same dense clip: stay at the frame that is looked at
  const seconds = dense.getAttribute("src") === address(value.dense) ? dense.currentTime : 0;
  for (const [video, path] of [[dense, value.dense], [sparse, value.sparse]]) {
    if (video.getAttribute("src") !== address(path) || video.error) video.src = address(path);
  }
  try {
    await Promise.all([ready(dense), ready(sparse)]);
  } catch {
    if (change === changes) say("The clips could not be loaded. Reload the page, or make the comparison again.");
    return;
  }
  if (change !== changes) return;
  frames = value.frames;
  scrubber.max = frames - 1;
  scrubber.disabled = play.disabled = frames === 1;
  sparseName.textContent = value.label;
  sparse.setAttribute("aria-label", value.label + ", clip");
  player.dataset.pixels = value.pixels;
  player.style.setProperty("--ratio", dense.videoWidth / dense.videoHeight);
  player.style.setProperty("--most", Math.max(512, value.pixels ? 2 * dense.videoWidth : dense.videoWidth) + "px");
  player.dataset.state = "shown";
  seek(seconds);
  if (wanted && frames > 1) start();
}

dense.muted = sparse.muted = true;
dense.addEventListener("play", () => {
  if (!ticking) tick();
  show();
});
dense.addEventListener("pause", () => {
  sparse.pause();
  show();
});
dense.addEventListener("ended", () => {
  if (!wanted || !loop.checked) return;
  seek(0);
  start();
});
wipe.addEventListener("input", setWipe);
scrubber.addEventListener("input", () => goTo(Number(scrubber.value)));
play.addEventListener("click", toggle);
player.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const slides = event.target.type === "range"; // it has its own use for arrows
  const pressed = event.target === play || event.target === loop; // they have their own use for the space bar
  if (event.key === " " && !pressed) toggle();
  else if (step && !slides) goTo(frameNow() + step);
  else return;
  event.preventDefault();
});
watch("value", load);
setWipe();
say("No clip yet.");
load();
