// The page: photo or camera in, classes and heatmap out. The worker runs the model.
import { resized } from "./resize.js";

const SHOWN_CLASSES = 5;
const LARGEST_SIDE = 4096; // of the photo's canvas: phones reject larger ones
const part = (id) => document.getElementById(id);
const [status, progress, photo, heat, video] = ["status", "progress", "photo", "heat", "video"].map(part);

let facts, worker, pixels, isReady = false, running = false, waiting = null, stream = null;

function say(text, isError = false) {
  status.textContent = text;
  status.hidden = !text;
  status.classList.toggle("error", isError);
  document.documentElement.dataset.state = isError ? "error" : isReady ? "ready" : "loading";
}

function fail(error) {
  progress.hidden = true;
  say(error?.message ?? String(error), true);
}

// Detects WebAssembly SIMD: a module with one function that contains a SIMD instruction.
const HAS_SIMD = typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(
  [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11]));

async function start() {
  if (location.protocol === "file:") return; // browsers do not load modules then; the text on the page says what to do
  if (!HAS_SIMD) throw new Error("This browser has no WebAssembly SIMD: use a newer one (Chrome 91, Firefox 89, Safari 16.4).");
  // Asks the server whether its copy is newer: after an update, an old half would not fit a new one.
  const response = await fetch("model.json", { cache: "no-cache" });
  if (!response.ok) throw new Error(`model.json: the server answers ${response.status}`);
  facts = await response.json();
  part("title").textContent = document.title = facts.title;
  part("names").append(...facts.classes.map((name) => new Option(name)));
  say(`Loading the model, ${megabytes(facts.bytes)} …`);
  progress.hidden = false;
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => fail(event.message || "the worker could not start");
  worker.onmessage = ({ data }) => receive(data);
  worker.postMessage({ start: facts, provider: new URLSearchParams(location.search).get("provider") });
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function receive(message) {
  if (message.error) {
    running = false;
    waiting = null;
    return fail(message.error);
  }
  if (message.progress !== undefined) progress.value = message.progress;
  if (message.opening) {
    progress.removeAttribute("value");
    say(`Starting ${message.opening === "webgpu" ? "WebGPU" : "WebAssembly"} …`);
  }
  if (message.ready) ready(message.ready);
  if (message.heatmap) show(message);
}

function ready({ provider, threads, error, notes }) {
  progress.hidden = true;
  isReady = true;
  part("tools").hidden = false;
  part("camera").hidden = !navigator.mediaDevices?.getUserMedia;
  const where = provider === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}`;
  part("about").textContent =
    `${facts.runtime} on ${where}; ${facts.method} at ${facts.layer}; self-test passed (relative error ${error.toExponential(1)}).`;
  say(notes.join("; "));
}

// One run at a time; of the requests that arrive meanwhile, only the last one is kept.
function explain(target) {
  if (running) { waiting = target; return; }
  running = true;
  worker.postMessage({ id: 0, pixels, shape: [1, ...facts.size, 3], target });
}

async function take(source) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("This file is not a picture that the browser can read.");
  });
  const shrink = Math.min(1, LARGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  photo.width = Math.max(1, Math.round(bitmap.width * shrink));
  photo.height = Math.max(1, Math.round(bitmap.height * shrink));
  const context = photo.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, photo.width, photo.height);
  bitmap.close();
  pixels = resized(context.getImageData(0, 0, photo.width, photo.height), ...facts.size);
}

async function open(file) {
  if (!file) return;
  try {
    stopCamera();
    say("");
    await take(file);
    explain(-1);
  } catch (error) {
    fail(error);
  }
}

function probabilities(logits) {
  const values = Array.from(logits);
  if (facts.scores === "sigmoid") return values.map((value) => 1 / (1 + Math.exp(-value)));
  if (facts.scores !== "softmax") return values; // already probabilities, or none
  const top = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - top));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

function show(result) {
  running = false;
  globalThis.fastcam = { facts, ...result }; // for tests, and for the curious
  document.body.classList.add("has-photo");
  part("view").hidden = false;
  paint(result.heatmap);
  const scores = probabilities(result.logits);
  const best = scores.map((_, index) => index).sort((a, b) => scores[b] - scores[a]).slice(0, SHOWN_CLASSES);
  if (!best.includes(result.target)) best.push(result.target);
  const focused = document.activeElement?.name === "class";
  part("classes").replaceChildren(...best.map((index) => row(index, scores[index], index === result.target)));
  if (focused) part("classes").querySelector("input:checked").focus();
  const evidence = result.heatmap.some((value) => value > 0);
  part("caption").textContent = `${facts.classes[result.target]}: ${evidence
    ? "red is where the evidence is strongest" : "no evidence for this class at this layer"} · ${result.milliseconds.toFixed(0)} ms`;
  heat.setAttribute("aria-label", `Heatmap of ${facts.classes[result.target]}`);
  document.documentElement.dataset.shown = result.target;
  if (waiting !== null) { const target = waiting; waiting = null; explain(target); }
  else if (stream) requestAnimationFrame(followCamera);
}

function row(index, score, checked) {
  const label = document.createElement("label"), input = document.createElement("input");
  const name = document.createElement("span"), value = document.createElement("b");
  label.className = "class";
  Object.assign(input, { type: "radio", name: "class", value: index, checked });
  input.addEventListener("change", () => explain(index));
  name.textContent = facts.classes[index];
  value.textContent = facts.scores === "none" ? score.toFixed(2) : `${(100 * score).toFixed(1)} %`;
  label.append(input, name, value);
  return label;
}

function paint(values) {
  const [height, width] = facts.size;
  Object.assign(heat, { width, height });
  const context = heat.getContext("2d"), image = context.createImageData(width, height);
  values.forEach((value, i) => {
    const color = 3 * Math.round(255 * Math.min(1, Math.max(0, value)));
    for (let channel = 0; channel < 3; channel++) image.data[4 * i + channel] = facts.colors[color + channel];
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

async function followCamera() {
  if (!stream) return;
  try {
    if (video.videoWidth) await take(video);
    if (!stream) return;
    if (pixels) explain(-1);
    else requestAnimationFrame(followCamera);
  } catch (error) {
    stopCamera();
    fail(error);
  }
}

async function toggleCamera() {
  if (stream) return stopCamera();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    await video.play();
    part("camera").setAttribute("aria-pressed", "true");
    say("");
    followCamera();
  } catch (error) {
    stopCamera();
    fail(`The camera cannot be used: ${error.message}`);
  }
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = video.srcObject = null;
  part("camera").setAttribute("aria-pressed", "false");
}

part("file").addEventListener("change", ({ target }) => { open(target.files[0]); target.value = ""; });
part("camera").addEventListener("click", toggleCamera);
part("opacity").addEventListener("input", ({ target }) => { heat.style.opacity = target.value / 100; });
heat.style.opacity = 0.5;
part("other").addEventListener("change", ({ target }) => {
  const index = facts.classes.indexOf(target.value);
  if (index >= 0 && pixels) explain(index);
});
for (const kind of ["dragover", "dragleave", "drop"])
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover");
    if (kind === "drop" && worker && !part("tools").hidden) open(event.dataTransfer.files[0]);
  });
addEventListener("paste", (event) => { if (!part("tools").hidden) open([...event.clipboardData.files][0]); });

start().catch(fail);
