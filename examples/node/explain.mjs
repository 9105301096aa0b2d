// Explain a photo with an exported file in Node: node explain.mjs MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
import { writeFile } from "node:fs/promises";
import { InferenceSession, Tensor } from "onnxruntime-node";
import sharp from "sharp";

const [model, photo, target, overlay, heatmap] = process.argv.slice(2);
const { data, info } = await sharp(photo).rotate().toColourspace("srgb").removeAlpha().raw()
  .toBuffer({ resolveWithObject: true });
const session = await InferenceSession.create(model);
const { logits, targets, heatmaps, overlays } = await session.run({
  pictures: new Tensor("uint8", data, [1, info.height, info.width, 3]),
  target: new Tensor("int64", [BigInt(target)], [1, 1]), // -1: the top class
});
const explained = Number(targets.data[0]);
if (explained < 0) throw new Error(`${model} has no class ${target}`);
console.log(`class ${explained}, score ${logits.data[explained].toFixed(4)}`);
const [, , height, width] = heatmaps.dims;
await sharp(overlays.data, { raw: { width, height, channels: 3 } }).png().toFile(overlay);
if (heatmap) await writeFile(heatmap, heatmaps.data);
