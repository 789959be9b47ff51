// A resumable loop (skipstep.export.onnx_sampler) in onnxruntime-web. The runtime is an argument: the page and Node share
// this module.

const STATE = /^(x_T|h[0-9])$/;

export class Sampler {
  constructor(ort, session, plan, shape) {
    Object.assign(this, { ort, session, plan, shape, size: shape.reduce((a, b) => a * b, 1) });
    this.states = session.inputNames.filter((name) => STATE.test(name));
    this.guided = session.inputNames.includes("guidance_scale");
  }

  // The batch is open; a provider that wants fixed shapes is told the batch in `options`.
  static async open(ort, model, plan, shape, options) {
    return new Sampler(ort, await ort.InferenceSession.create(model, options), plan, shape);
  }

  // `count` stages from `first` on. `request` has seeds (BigInt) and labels, one of each for a sample, or `conditions`
  // as tensors in place of labels, and guidance; `state` has what the last call returned, or an x_T to start from.
  // Float32Arrays, B samples in each.
  async stages(request, first, count, state = {}) {
    const { ort } = this, batch = request.seeds.length;
    const scalar = (value) => new ort.Tensor("int64", BigInt64Array.of(BigInt(value)), []);
    const feeds = {
      seeds: new ort.Tensor("uint64", BigUint64Array.from(request.seeds), [batch]),
      first_stage: scalar(first),
      num_stages: scalar(count),
      ...request.conditions,
    };
    if (request.labels) feeds.class_labels = new ort.Tensor("int64", BigInt64Array.from(request.labels, BigInt), [batch]);
    if (this.guided) {
      feeds.guidance_scale = new ort.Tensor("float32", new Float32Array(batch).fill(request.guidance), [batch]);
    }
    for (const name of this.states) {
      const values = state[name] ?? new Float32Array(0);
      feeds[name] = new ort.Tensor("float32", values, [values.length / this.size, ...this.shape]);
    }
    const results = await this.session.run(feeds);
    const next = { x_T: results.x_0.data, predicted: results.x0.data.slice(-batch * this.size) };
    for (const name of this.states) if (name !== "x_T") next[name] = results[`next_${name}`].data;
    return next;
  }

  // The initial noise of the request's seeds.
  async initial(request) {
    return (await this.stages(request, 0, 0)).x_T;
  }

  // All stages, one in a run. `onStage(done, predicted)` may return false to stop: then there is no result.
  async draw(request, { x_T, onStage = () => true } = {}) {
    let state = x_T ? { x_T } : {};
    for (let stage = 0; stage < this.plan.evaluations; stage++) {
      state = await this.stages(request, stage, 1, state);
      if ((await onStage(stage + 1, state.predicted)) === false) return null;
    }
    return state.x_T;
  }
}

// As skipstep.editing.interpolation: along the arc from a to b, weight 0 to 1, in double precision.
export function slerp(a, b, weight) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, ab / Math.sqrt(aa * bb))));
  const near = angle < 1e-6;
  const from = near ? 1 - weight : Math.sin((1 - weight) * angle) / Math.sin(angle);
  const to = near ? weight : Math.sin(weight * angle) / Math.sin(angle);
  return Float32Array.from(a, (value, i) => from * value + to * b[i]);
}

// Eight bits from [-1, 1], halves to even as skipstep.calls.images. Every operation rounds to float32.
export function toPixels(samples) {
  return Uint8Array.from(samples, (value) => {
    const scaled = Math.fround(Math.fround(Math.min(1, Math.max(-1, value)) + 1) * 127.5), whole = Math.floor(scaled);
    const rest = scaled - whole;
    return rest > 0.5 || (rest === 0.5 && whole % 2) ? whole + 1 : whole;
  });
}

// Of channels that are the pixels of squares of `factor` a side, as torch's pixel_shuffle orders them.
export function fromSquares(samples, [, height, width], factor) {
  const made = new Float32Array(samples.length);
  samples.forEach((value, k) => {
    const x = k % width, y = Math.floor(k / width) % height, square = Math.floor(k / (width * height));
    const i = Math.floor(square / factor) % factor, j = square % factor, channel = Math.floor(square / factor ** 2);
    made[((channel * height + y) * factor + i) * width * factor + x * factor + j] = value;
  });
  return made;
}

export function fromPixels(pixels) {
  return Float32Array.from(pixels, (value) => value / 127.5 - 1);
}

export function largestDifference(a, b) {
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i])), 0);
}
