// The page: draw a digit or let one be generated; both are classified as soon as they change.

import { classify } from "./classifier.js";
import { loadModel } from "./model.js";
import { generate } from "./sampler.js";

const status = document.getElementById("status");
const canvas = document.getElementById("picture");
const list = document.getElementById("labels");
const [classifier, generator] = await load();
const [, height, width] = classifier.settings.shape;
let pixels = new Float32Array(height * width);

async function load() {
  try {
    return await Promise.all([loadModel("models/classifier"), loadModel("models/generator")]);
  } catch (error) {
    status.textContent = `No models: ${error.message}. The comment in index.html says how to unpack them.`;
    throw error;
  }
}

/** Draw the picture on its canvas and say what it shows. */
async function show(task) {
  const start = performance.now();
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  pixels.forEach((value, k) => image.data.set([value * 255, value * 255, value * 255, 255], 4 * k));
  context.putImageData(image, 0, 0);
  const labels = await classify(classifier, pixels);
  list.replaceChildren(...labels.slice(0, 3).map(({ name, probability }) => {
    const item = document.createElement("li");
    item.textContent = `${name}: ${(100 * probability).toFixed(1)} %`;
    item.style.setProperty("--share", probability);
    return item;
  }));
  status.textContent = `${task}, classified in ${(performance.now() - start).toFixed(1)} ms`;
}

function drawAt(event) {
  if (!event.buttons) return;
  const box = canvas.getBoundingClientRect();
  const column = ((event.clientX - box.left) / box.width) * width - 0.5;
  const row = ((event.clientY - box.top) / box.height) * height - 0.5;
  pixels = pixels.map((value, k) => {
    const distance = Math.hypot((k % width) - column, Math.floor(k / width) - row);
    return Math.max(value, Math.min(1, Math.max(0, 1.3 - distance)));
  });
  show("drawn");
}

canvas.width = width;
canvas.height = height;
canvas.addEventListener("pointerdown", drawAt);
canvas.addEventListener("pointermove", drawAt);
document.getElementById("clear").addEventListener("click", () => {
  pixels = new Float32Array(height * width);
  show("cleared");
});
const names = generator.labels.length ? generator.labels : classifier.labels;
document.getElementById("generate").replaceChildren(...names.map((name, label) => {
  const button = document.createElement("button");
  button.textContent = name;
  button.addEventListener("click", async () => {
    const start = performance.now();
    pixels = await generate(generator, label, Math.floor(Math.random() * 2 ** 32));
    await show(`a ${name} generated in ${(performance.now() - start).toFixed(1)} ms`);
  });
  return button;
}));
await show("ready");
