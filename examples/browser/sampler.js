// The driver `sampler` of compressor/runtimes, in JavaScript: noise, the denoiser's steps, guidance.
// The noise is another than numpy's, so the same seed gives another sample.

/**
 * Draw one picture of a label.
 *
 * @param model What loadModel gave.
 * @param label Row of the condition tables.
 * @param seed Whole number.
 * @returns Float32Array of C * H * W values in [0, 1], channel by channel.
 */
export async function generate(model, label, seed) {
  const { settings, arrays } = model;
  const random = normal(seed);
  const size = settings.shape.reduce((a, b) => a * b, 1);
  const noise = () => Float32Array.from({ length: size }, random);
  const { signal, sigma } = amplitudes(arrays);
  const timesteps = arrays.timesteps.values;
  let sample = noise().map((value) => value * (settings.initial_scale ?? 1));
  for (let step = 0; step < timesteps.length; step++) {
    const prediction = await predict(model, sample, timesteps[step], label);
    if (settings.rule === "euler") {
      sample = sample.map((value, k) => value + (sigma[step + 1] - sigma[step]) * prediction[k]);
      continue;
    }
    const fresh = settings.rule === "renoise" && step + 1 < timesteps.length ? noise() : null;
    sample = sample.map((value, k) => {
      const [clean, implied] = split(settings.prediction_type, value, prediction[k], signal[step], sigma[step]);
      return signal[step + 1] * clean + sigma[step + 1] * (fresh ? fresh[k] : implied);
    });
  }
  const limit = settings.clip ?? 1;
  return sample.map((value) => (Math.min(Math.max(value, -limit), limit) / limit + 1) / 2);
}

function amplitudes(arrays) {
  if (arrays.levels) {
    const sigma = arrays.levels.values;
    return { sigma, signal: sigma.map((value) => 1 - value) };
  }
  const kept = arrays.signal.values;
  return { signal: kept.map(Math.sqrt), sigma: kept.map((value) => Math.sqrt(1 - value)) };
}

/** The clean value and the noise that a prediction implies. */
function split(kind, value, guess, signal, sigma) {
  if (kind === "flow") return [value - sigma * guess, value + signal * guess];
  if (kind === "epsilon") return [(value - sigma * guess) / signal, guess];
  if (kind === "v_prediction") return [signal * value - sigma * guess, sigma * value + signal * guess];
  return [guess, (value - signal * guess) / sigma];
}

async function predict(model, sample, timestep, label) {
  const { settings } = model;
  const guided = await call(model, sample, timestep, label);
  const scale = settings.guidance_scale ?? 1;
  if (scale === 1) return guided;
  const empty = await call(model, sample, timestep, settings.null_row);
  return guided.map((value, k) => empty[k] + scale * (value - empty[k]));
}

async function call(model, sample, timestep, row) {
  const inputs = {
    sample: { values: sample, shape: [1, ...model.settings.shape] },
    timestep: { values: [timestep], shape: [1] },
  };
  for (const [name, { shape, values }] of Object.entries(model.arrays)) {
    if (!name.startsWith("condition.")) continue;
    const length = values.length / shape[0];
    const chosen = values.slice(row * length, (row + 1) * length);
    inputs[name.slice("condition.".length)] = { values: chosen, shape: [1, ...shape.slice(1)] };
  }
  const { prediction } = await model.graphs.denoiser(inputs);
  return Float32Array.from(prediction.data);
}

/** Normal random numbers: Mulberry32 through Box and Muller's transform. */
function normal(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}
