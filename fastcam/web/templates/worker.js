// Runs the session off the page's thread. In: {start}, then {id, pixels, shape, target}. Out: progress, ready,
// results and errors.

let ort, session;

async function load(facts, say) {
  const response = await fetch("model.onnx", { cache: "no-cache" });
  if (!response.ok) throw new Error(`model.onnx: the server answers ${response.status}`);
  const model = new Uint8Array(facts.bytes);
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    if (done + value.length > model.length) throw new Error("model.onnx is longer than model.json says: build the site again");
    model.set(value, done);
    done += value.length;
    say({ progress: done / facts.bytes });
  }
  if (done !== facts.bytes) throw new Error("model.onnx arrived incomplete: reload the page");
  return model;
}

async function open(model, provider) {
  ort = await import(provider === "webgpu" ? "./ort/ort.webgpu.min.mjs" : "./ort/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("ort/", self.location).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(model, { executionProviders: [provider] });
}

async function run(pixels, shape, target) {
  const begin = performance.now();
  const outputs = await session.run({
    pictures: new ort.Tensor("uint8", pixels, shape),
    target: new ort.Tensor("int64", [BigInt(target)], [1, 1]),
  }, ["logits", "targets", "heatmaps"]);
  const [logits, targets, heatmap] = ["logits", "targets", "heatmaps"].map((name) => outputs[name].data);
  return { logits, target: Number(targets[0]), heatmap, milliseconds: performance.now() - begin };
}

// Value number i of the test's picture is one byte of a hash of i.
function testPicture(shape) {
  const pixels = new Uint8Array(shape.reduce((a, b) => a * b));
  for (let i = 0; i < pixels.length; i++) {
    let x = Math.imul(i + 1, 0x9e3779b1);
    x = Math.imul(x ^ (x >>> 15), 0x85ebca77);
    pixels[i] = x >>> 24;
  }
  return pixels;
}

function relativeError(found, expected) {
  let error = 0, norm = 0;
  expected.forEach((value, i) => { error += (found[i] - value) ** 2; norm += value ** 2; });
  return Math.sqrt(norm ? error / norm : error);
}

// The largest relative error of scores and heatmap; NaN or infinity fail every comparison.
async function selftest({ shape, target, logits, step, heatmap }, [height, width]) {
  const result = await run(testPicture(shape), shape, target);
  const sampled = [];
  for (let y = 0; y < height; y += step)
    for (let x = 0; x < width; x += step) sampled.push(result.heatmap[y * width + x]);
  return result.target === target ? Math.max(relativeError(result.logits, logits), relativeError(sampled, heatmap)) : NaN;
}

async function start(facts, allowed) {
  const model = await load(facts, (message) => postMessage(message));
  const providers = [];
  if (allowed !== "wasm" && self.navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null))) providers.push("webgpu");
  if (allowed !== "webgpu") providers.push("wasm");
  const notes = [];
  for (const provider of providers) {
    let reason;
    try {
      postMessage({ opening: provider });
      await open(model, provider);
      const error = await selftest(facts.selftest, facts.size);
      if (error <= facts.selftest.tolerance) {
        postMessage({ ready: { provider, threads: ort.env.wasm.numThreads, error, notes } });
        return;
      }
      reason = `its self-test differs by ${error.toExponential(1)}, where ${facts.selftest.tolerance} is allowed`;
    } catch (error) {
      reason = error?.message ?? String(error);
    }
    notes.push(`${provider} cannot run this model: ${reason}`);
  }
  throw new Error(notes.join("; ") || "this browser has no WebGPU");
}

onmessage = async ({ data }) => {
  try {
    if (data.start) await start(data.start, data.provider);
    else postMessage({ id: data.id, ...(await run(data.pixels, data.shape, data.target)) });
  } catch (error) {
    postMessage({ id: data.id, error: error?.message ?? String(error) });
  }
};
