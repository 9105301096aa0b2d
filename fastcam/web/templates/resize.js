// Resizing as Pillow's bilinear filter does it, bit-identical: a triangle as wide as the step when shrinking, 22-bit
// weights, the width first, every step rounded to whole levels. JavaScript's numbers hold the sums exactly.

const SCALE = 2 ** 22;

function weights(before, after) {
  const step = before / after, width = Math.max(step, 1);
  return Array.from({ length: after }, (_, position) => {
    const center = (position + 0.5) * step;
    const first = Math.max(Math.trunc(center - width + 0.5), 0);
    const end = Math.min(Math.trunc(center + width + 0.5), before);
    const raw = Array.from({ length: end - first }, (_, k) => Math.max(0, 1 - Math.abs((k + first - center + 0.5) / width)));
    const total = raw.reduce((sum, weight) => sum + weight, 0);
    return { first, factors: raw.map((weight) => Math.trunc(0.5 + (weight / total) * SCALE)) };
  });
}

const level = (sum) => Math.min(255, Math.max(0, Math.floor((sum + SCALE / 2) / SCALE)));

// RGBA pixels of a canvas -> RGB pixels (height, width, 3) of another size.
export function resized({ data, width: columns, height: rows }, height, width) {
  const across = weights(columns, width), down = weights(rows, height);
  const wide = new Uint8Array(rows * width * 3);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < width; x++) {
      const { first, factors } = across[x];
      let red = 0, green = 0, blue = 0, at = (y * columns + first) * 4;
      for (let k = 0; k < factors.length; k++, at += 4) {
        red += factors[k] * data[at]; green += factors[k] * data[at + 1]; blue += factors[k] * data[at + 2];
      }
      const to = (y * width + x) * 3;
      wide[to] = level(red); wide[to + 1] = level(green); wide[to + 2] = level(blue);
    }
  const result = new Uint8Array(height * width * 3);
  for (let y = 0; y < height; y++) {
    const { first, factors } = down[y];
    for (let x = 0; x < width * 3; x++) {
      let sum = 0, at = first * width * 3 + x;
      for (let k = 0; k < factors.length; k++, at += width * 3) sum += factors[k] * wide[at];
      result[y * width * 3 + x] = level(sum);
    }
  }
  return result;
}
