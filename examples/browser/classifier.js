// The driver `predict` of compressor/runtimes, in JavaScript: normalise, run, softmax.

/**
 * Labels of a picture, the most probable first.
 *
 * @param model What loadModel gave.
 * @param pixels Float32Array of C * H * W values in [0, 1], channel by channel.
 */
export async function classify(model, pixels) {
  const { mean = [0], std = [1], shape } = model.settings;
  const area = pixels.length / shape[0];
  const values = pixels.map((value, k) => {
    const channel = Math.floor(k / area) % mean.length;
    return (value - mean[channel]) / std[channel];
  });
  const { logits } = await model.graphs.classifier({ image: { values, shape: [1, ...shape] } });
  const scores = Array.from(logits.data, Number);
  const largest = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - largest));
  const sum = weights.reduce((a, b) => a + b, 0);
  const found = weights.map((weight, index) => ({
    index,
    name: model.labels[index] ?? String(index),
    probability: weight / sum,
  }));
  return found.sort((a, b) => b.probability - a.probability);
}
