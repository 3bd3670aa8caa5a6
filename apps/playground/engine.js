// The book's small CNN, its maps and their similarity, in plain JavaScript and without a page.
//
// Images and maps are Float32Arrays of 28 x 28 values, row by row. Inside the network a layer's values are
// (row, column, channel), so that the innermost loop of a convolution runs along memory. Parameters keep
// PyTorch's order: they can be handed to torch and back, which is how the tests compare the two.
"use strict";

const engine = (() => {
  const SIDE = 28;
  // From the image to the output, as in helpers/book/models.py.
  const LAYERS = [
    { name: "conv1", from: 1, to: 16, kernel: 5 },
    { name: "conv2", from: 16, to: 32, kernel: 5 },
    { name: "fc1", from: 32 * 7 * 7, to: 64, kernel: 1 },
    { name: "logits", from: 64, to: 10, kernel: 1 },
  ];
  const fanIn = (spec) => spec.from * spec.kernel ** 2;

  // ---------------------------------------------------------------- numbers as they are shipped

  const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

  /** Finite half-precision numbers in base64 as Float32Array: the bits moved over, the exponent's offset put right. */
  function halves(base64) {
    const moved = Uint32Array.from(new Uint16Array(bytes(base64).buffer), (half) => ((half & 0x8000) << 16) | ((half & 0x7fff) << 13));
    return new Float32Array(moved.buffer).map((value) => value * 2 ** 112);
  }

  /** Pixels, a byte each in base64, as images in [0, 1]. */
  function images(base64) {
    const pixels = Float32Array.from(bytes(base64), (byte) => byte / 255);
    return Array.from({ length: pixels.length / SIDE ** 2 }, (_, i) => pixels.subarray(i * SIDE ** 2, (i + 1) * SIDE ** 2));
  }

  // ---------------------------------------------------------------- layers and networks

  /** A layer with its parameters; a convolution also gets its kernels in the order of the two passes. */
  function layer(spec, weight, bias) {
    const { from, to, kernel } = spec;
    if (kernel === 1) return { weight, bias };
    const forward = new Float32Array(weight.length);
    const backward = new Float32Array(weight.length);
    const last = kernel ** 2 - 1;
    for (let o = 0; o < to; o++) {
      for (let i = 0; i < from; i++) {
        for (let k = 0; k <= last; k++) {
          const value = weight[(o * from + i) * (last + 1) + k];
          forward[(k * from + i) * to + o] = value;
          backward[((last - k) * to + o) * from + i] = value;
        }
      }
    }
    return { weight, bias, forward, backward };
  }

  /** A network, name -> layer, from the numbers of its PyTorch `state_dict` one after the other. */
  function network(numbers) {
    let at = 0;
    const take = (count) => numbers.subarray(at, (at += count));
    return Object.fromEntries(LAYERS.map((spec) => [spec.name, layer(spec, take(spec.to * fanIn(spec)), take(spec.to))]));
  }

  /** Uniform numbers in [0, 1) from a seed (mulberry32, a public-domain generator by Tommy Ettinger). */
  function generator(seed) {
    let state = seed | 0;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** A layer drawn anew as PyTorch does: weight and bias uniform within 1 / sqrt(fan-in). */
  function randomLayer(name, seed) {
    const spec = LAYERS.find((one) => one.name === name);
    const random = generator(seed);
    const bound = 1 / Math.sqrt(fanIn(spec));
    const draw = (count) => Float32Array.from({ length: count }, () => bound * (2 * random() - 1));
    return layer(spec, draw(spec.to * fanIn(spec)), draw(spec.to));
  }

  // ---------------------------------------------------------------- passes

  /** Add to `result` (side, side, to) the 5 x 5 convolution, zero-padded, of `values` (side, side, from). */
  function convolve(values, side, from, to, kernels, result) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        for (let i = 0; i < from; i++) {
          const value = values[(y * side + x) * from + i];
          if (value === 0) continue;
          for (let row = Math.max(0, y - 2); row <= Math.min(side - 1, y + 2); row++) {
            for (let column = Math.max(0, x - 2); column <= Math.min(side - 1, x + 2); column++) {
              const place = (row * side + column) * to;
              const kernel = (((y - row + 2) * 5 + (x - column + 2)) * from + i) * to;
              for (let o = 0; o < to; o++) result[place + o] += value * kernels[kernel + o];
            }
          }
        }
      }
    }
    return result;
  }

  const rectify = (values) => values.map((value) => Math.max(0, value));

  /** The largest of every 2 x 2 values, and where it was; of equal ones the first. */
  function pool(values, side, channels) {
    const pooled = new Float32Array(values.length / 4);
    const origin = new Uint16Array(pooled.length);
    for (let place = 0; place < pooled.length; place++) {
      const channel = place % channels;
      const cell = (place - channel) / channels;
      const half = side / 2;
      const corner = (2 * Math.floor(cell / half) * side + 2 * (cell % half)) * channels + channel;
      let best = corner;
      for (const other of [corner + channels, corner + side * channels, corner + (side + 1) * channels]) {
        if (values[other] > values[best]) best = other;
      }
      pooled[place] = values[best];
      origin[place] = best;
    }
    return { pooled, origin };
  }

  /** Send values back to where `pool` found them. */
  function unpool(values, origin) {
    const result = new Float32Array(4 * values.length);
    origin.forEach((place, i) => (result[place] = values[i]));
    return result;
  }

  const repeat = (bias, times) => Float32Array.from({ length: bias.length * times }, (_, i) => bias[i % bias.length]);

  /** The transpose of a matrix of that many columns. */
  function transposed(values, columns) {
    const rows = values.length / columns;
    return Float32Array.from(values, (_, i) => values[(i % rows) * columns + Math.floor(i / rows)]);
  }

  function dense({ weight, bias }, values) {
    return bias.map((start, o) => {
      let sum = start;
      for (let i = 0; i < values.length; i++) sum += weight[o * values.length + i] * values[i];
      return sum;
    });
  }

  /** All values of a forward pass that the backward pass needs, and the logits. */
  function forward(net, image) {
    const active1 = rectify(convolve(image, 28, 1, 16, net.conv1.forward, repeat(net.conv1.bias, 28 ** 2)));
    const pool1 = pool(active1, 28, 16);
    const active2 = rectify(convolve(pool1.pooled, 14, 16, 32, net.conv2.forward, repeat(net.conv2.bias, 14 ** 2)));
    const pool2 = pool(active2, 14, 32);
    const active3 = rectify(dense(net.fc1, transposed(pool2.pooled, 32)));
    return { active1, pool1, active2, pool2, active3, logits: dense(net.logits, active3) };
  }

  /** Back from the logit `target` to the image. A guided ReLU also stops what is negative. */
  function backward(net, pass, target, guided) {
    const throughRelu = (above, active) =>
      above.map((value, i) => (active[i] > 0 && !(guided && value < 0) ? value : 0));
    const start = net.logits.weight.subarray(64 * target, 64 * (target + 1));
    const above3 = throughRelu(start, pass.active3);
    const flat = new Float32Array(pass.pool2.pooled.length);
    above3.forEach((value, o) => {
      if (value !== 0) for (let i = 0; i < flat.length; i++) flat[i] += value * net.fc1.weight[o * flat.length + i];
    });
    const above2 = throughRelu(unpool(transposed(flat, 7 * 7), pass.pool2.origin), pass.active2);
    const below2 = convolve(above2, 14, 32, 16, net.conv2.backward, new Float32Array(14 ** 2 * 16));
    const above1 = throughRelu(unpool(below2, pass.pool1.origin), pass.active1);
    return convolve(above1, 28, 16, 1, net.conv1.backward, new Float32Array(28 ** 2));
  }

  function softmax(logits) {
    const top = Math.max(...logits);
    const powers = Array.from(logits, (logit) => Math.exp(logit - top));
    const sum = powers.reduce((total, power) => total + power, 0);
    return powers.map((power) => power / sum);
  }

  const argmax = (values) => values.indexOf(Math.max(...values));

  // ---------------------------------------------------------------- maps

  /** Size of the Sobel gradient, as `saliency_sanity.edges.sobel`: it sees the image and no network. */
  function sobel(image) {
    const inside = (place) => Math.min(SIDE - 1, Math.max(0, place));
    const at = (y, x) => image[inside(y) * SIDE + inside(x)];
    return image.map((_, i) => {
      const [y, x] = [Math.floor(i / SIDE), i % SIDE];
      const slope = (one) => (one(1, -1) + 2 * one(1, 0) + one(1, 1) - one(-1, -1) - 2 * one(-1, 0) - one(-1, 1)) / 4;
      const [down, across] = [slope((u, v) => at(y + u, x + v)), slope((u, v) => at(y + v, x + u))];
      return Math.sqrt((down ** 2 + across ** 2) / 2);
    });
  }

  /** The maps of an image by name; `pass` is the network's forward pass of it. */
  function maps(net, image, pass, target) {
    const gradient = backward(net, pass, target, false);
    return {
      gradient,
      input_x_gradient: gradient.map((slope, i) => slope * image[i]),
      guided_backprop: backward(net, pass, target, true),
      sobel: sobel(image),
    };
  }

  const largest = (map) => map.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

  // ---------------------------------------------------------------- similarity

  /** Ranks of the values, ties sharing their average, centred and of length 1; null for a constant map. */
  function unitRanks(map) {
    const order = Uint16Array.from(map.keys()).sort((a, b) => map[a] - map[b]);
    const ranks = new Float64Array(map.length);
    for (let first = 0; first < order.length; ) {
      let next = first;
      while (next < order.length && map[order[next]] === map[order[first]]) next++;
      for (let i = first; i < next; i++) ranks[order[i]] = (first + next - order.length) / 2;
      first = next;
    }
    const length = Math.hypot(...ranks);
    return length ? ranks.map((rank) => rank / length) : null;
  }

  /** Spearman's rank correlation from `unitRanks` of both maps; NaN where one of them is constant. */
  const correlation = (a, b) => (a && b ? a.reduce((sum, value, i) => sum + value * b[i], 0) : NaN);

  // ---------------------------------------------------------------- drawings

  /** The shade of each pixel under a pen of that width that follows the strokes, lists of points [x, y]. */
  function rasterise(strokes, width) {
    const image = new Float32Array(SIDE ** 2);
    for (const stroke of strokes) {
      stroke.forEach(([x1, y1], i) => {
        const [x0, y0] = stroke[Math.max(0, i - 1)];
        const [dx, dy] = [x1 - x0, y1 - y0];
        image.forEach((shade, place) => {
          const [x, y] = [(place % SIDE) + 0.5 - x0, Math.floor(place / SIDE) + 0.5 - y0];
          const along = Math.min(1, Math.max(0, (x * dx + y * dy) / (dx ** 2 + dy ** 2 || 1)));
          const distance = Math.hypot(x - along * dx, y - along * dy);
          image[place] = Math.max(shade, Math.min(1, width / 2 + 0.5 - distance));
        });
      });
    }
    return image;
  }

  /**
   * Strokes as an image in the manner of MNIST: the pen's usual width, the longer side of the drawing scaled
   * to 20 pixels, its centre of mass in the middle. A drawing is enlarged four times at most.
   */
  function normalise(strokes, width) {
    const points = strokes.flat();
    if (!points.length) return new Float32Array(SIDE ** 2);
    const moved = (scale, [right, down]) =>
      rasterise(strokes.map((stroke) => stroke.map(([x, y]) => [x * scale + right, y * scale + down])), width);
    const ends = [0, 1].map((axis) => points.map((point) => point[axis])).map((all) => [Math.min(...all), Math.max(...all)]);
    const extent = Math.max(...ends.map(([low, high]) => high - low));
    const scale = Math.min(4, (20 - width) / extent);
    const centred = ends.map(([low, high]) => SIDE / 2 - (scale * (low + high)) / 2);
    const image = moved(scale, centred);
    const mass = image.reduce((sum, shade) => sum + shade, 0);
    const centre = [(i) => i % SIDE, (i) => Math.floor(i / SIDE)].map(
      (coordinate) => image.reduce((sum, shade, i) => sum + shade * (coordinate(i) + 0.5), 0) / mass,
    );
    return moved(scale, centred.map((shift, axis) => shift + SIDE / 2 - centre[axis]));
  }

  /** How far an image is from the mean of the training images, as `Training.distance` in apps/playground/playground.py. */
  function distance(image, { mean, components, variances, rest }) {
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
    const centred = image.map((value, i) => value - mean[i]);
    let [known, left] = [0, dot(centred, centred)];
    variances.forEach((variance, k) => {
      const along = dot(centred, components.subarray(k * image.length, (k + 1) * image.length)) ** 2;
      known += along / variance;
      left -= along;
    });
    return Math.sqrt((known + left / rest) / image.length);
  }

  return {
    SIDE, LAYERS, bytes, halves, images, network, randomLayer, forward, softmax, argmax, maps, largest,
    unitRanks, correlation, normalise, distance,
  };
})();
