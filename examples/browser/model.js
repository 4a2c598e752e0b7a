// A model that examples/unpack.py has written: its facts, and its graphs in onnxruntime-web.

import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1; // more need a page that is isolated from others

const ARRAYS = {
  float32: (values) => Float32Array.from(values),
  int64: (values) => BigInt64Array.from(Array.from(values, (value) => BigInt(Math.trunc(value)))),
};

/** Load the model in a folder. */
export async function loadModel(folder) {
  const answer = await fetch(`${folder}/model.json`);
  if (!answer.ok) throw new Error(`${folder}/model.json: ${answer.status}`);
  const facts = await answer.json();
  const graphs = {};
  for (const [name, graph] of Object.entries(facts.graphs)) {
    const session = await ort.InferenceSession.create(`${folder}/${graph.file}`, { executionProviders: ["wasm"] });
    graphs[name] = (inputs) => run(session, graph, inputs);
  }
  return { ...facts, graphs };
}

/** Run one graph: named arrays with their shapes in, named tensors out. */
async function run(session, graph, inputs) {
  const feeds = {};
  for (const { name, dtype } of graph.inputs) {
    const { values, shape } = inputs[name];
    feeds[name] = new ort.Tensor(dtype, ARRAYS[dtype](values), shape);
  }
  return session.run(feeds);
}
