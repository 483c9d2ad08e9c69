// Pillow's resampling of RGB pixels, of a region of the result only: first along the rows, then along the columns, with
// weights of 22 bits and 8-bit values between the two, so that the network sees the pixels that it was trained on. A
// canvas of its own would resize by other filters, which differ from browser to browser.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  box: { support: 0.5, at: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  hamming: { support: 1, at: (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x))) },
  bicubic: {
    support: 2,
    at: (signed) => {
      const x = Math.abs(signed);
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
      return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
    },
  },
  lanczos: { support: 3, at: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};
const ONE = 2 ** 22;

// One direction of a resize of `from` pixels to `to`: for each of `count` results from `first` on, the pixel that its
// window starts at and the weights of its pixels, which add up to ONE.
function windows(from, to, first, count, filter) {
  const scale = from / to;
  const results = Array.from({ length: count }, (_, index) => first + index);
  if (from === to) return results.map((start) => ({ start, weights: [ONE] }));
  if (filter === "nearest") {
    let centre = scale / 2; // summed up as Pillow sums it up, since rounding decides on borders between pixels
    const centres = Array.from({ length: first + count }, (_, index) => (index ? (centre += scale) : centre));
    return results.map((result) => ({ start: Math.min(from - 1, Math.floor(centres[result])), weights: [ONE] }));
  }
  const widened = Math.max(scale, 1);
  const { support, at } = FILTERS[filter];
  return results.map((result) => {
    const centre = (result + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support * widened + 0.5));
    const end = Math.min(from, Math.trunc(centre + support * widened + 0.5));
    const values = Array.from({ length: end - start }, (_, index) => at((start + index - centre + 0.5) / widened));
    const sum = values.reduce((a, b) => a + b, 0) || 1;
    return { start, weights: values.map((value) => Math.trunc((value / sum) * ONE + (value < 0 ? -0.5 : 0.5))) };
  });
}

const clipped = (sum) => Math.min(255, Math.max(0, (sum + ONE / 2) >> 22));

// How a picture of this size becomes the input: the region of it that matters, and its two directions. `resize` is the
// rule of the run, as in data/resize.py.
function planOf(width, height, resize) {
  const { method, side, shorter } = resize;
  if (method === "upsample") {
    const square = Math.min(width, height);
    const along = () => windows(square, side, 0, side, "bicubic");
    const [left, top] = [width, height].map((length) => Math.floor((length - square) / 2));
    return { left, top, width: square, height: square, side, across: along(), down: along() };
  }
  const to = (length, other) => (length <= other ? shorter : Math.floor((shorter * length) / other));
  const along = (length, resized) => windows(length, resized, halfToEven(resized - side), side, resize.interpolation);
  const [across, down] = [along(width, to(width, height)), along(height, to(height, width))];
  return { left: 0, top: 0, width, height, side, across, down };
}

// Half of an integer; what lies between two integers becomes the even one, as Python's `round` does it.
function halfToEven(length) {
  const half = Math.floor(length / 2);
  return length % 2 && half % 2 ? half + 1 : half;
}

// Resizes a picture by a plan. `read(left, top, width, height)` gives RGBA pixels of a part of it: it is read in strips,
// as a canvas with all pixels of a camera is more than phones allow.
function resized(plan, read) {
  const { side, across, down } = plan;
  const most = Math.max(1, Math.floor(2 ** 21 / plan.width));
  const begin = Math.min(...down.map(({ start }) => start));
  const end = Math.max(...down.map(({ start, weights }) => start + weights.length));
  const rows = new Uint8Array((end - begin) * side * 3);
  for (let top = begin; top < end; top += most) {
    const height = Math.min(most, end - top);
    const pixels = read(plan.left, plan.top + top, plan.width, height);
    for (let y = 0; y < height; y++) {
      alongRow(pixels, y * plan.width * 4, across, rows, (top - begin + y) * side * 3);
    }
  }
  const result = new Uint8Array(side * side * 3);
  down.forEach(({ start, weights }, y) => {
    for (let x = 0; x < side * 3; x++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += rows[(start - begin + k) * side * 3 + x] * weights[k];
      result[y * side * 3 + x] = clipped(sum);
    }
  });
  return result;
}

function alongRow(pixels, offset, across, rows, out) {
  for (const { start, weights } of across) {
    let [red, green, blue, at] = [0, 0, 0, offset + start * 4];
    for (const weight of weights) {
      red += pixels[at] * weight;
      green += pixels[at + 1] * weight;
      blue += pixels[at + 2] * weight;
      at += 4;
    }
    rows[out++] = clipped(red);
    rows[out++] = clipped(green);
    rows[out++] = clipped(blue);
  }
}
