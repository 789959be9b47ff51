// What Python asks of onnxruntime-web under Node, as JSON: one line in, one line out.
// {tokenizer, about, tokenize: [text]}: ids of each; or
// {model, wasm, run: {NAME: [type, dims, base64]}}, or {model, plan, shape, draw: request}: outputs by name in base64.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const json = (path) => JSON.parse(readFileSync(path, "utf8"));
const ort = await import(pathToFileURL(asked.runtime));
const { Prompts, Tokenizer } = await import(pathToFileURL(asked.sampler.replace("sampler.js", "prompts.js")));
const { Sampler, fromSquares, toPixels, slerp } = await import(pathToFileURL(asked.sampler));
const TYPES = { float32: Float32Array, int64: BigInt64Array, uint64: BigUint64Array };
const encode = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");
const decode = (type, text) => new TYPES[type](new Uint8Array(Buffer.from(text, "base64")).buffer);
ort.env.wasm.numThreads = 1;

const answer = {};
if (asked.tokenize) {
  const tokenizer = new Tokenizer(json(asked.tokenizer), asked.about);
  Object.assign(answer, { read: asked.tokenize.map((text) => tokenizer.encode(text)) });
} else if (asked.prompt !== undefined) {
  const { about } = asked, prompts = await Prompts.open(ort, json(asked.tokenizer), readFileSync(asked.encoder), about);
  const sampler = await Sampler.open(ort, readFileSync(asked.model), asked.plan, about.shape, {});
  const request = { seeds: asked.seeds.map(BigInt), guidance: about.guidance, ...(await prompts.read(asked.prompt)) };
  answer.x_0 = encode(fromSquares(await sampler.draw(request), about.shape, about.factor));
} else if (asked.run) {
  const session = await ort.InferenceSession.create(readFileSync(asked.model), { executionProviders: ["wasm"] });
  const feeds = {};
  for (const [name, [type, dims, data]] of Object.entries(asked.run)) {
    feeds[name] = new ort.Tensor(type, decode(type, data), dims);
  }
  for (const [name, value] of Object.entries(await session.run(feeds))) answer[name] = encode(value.data);
} else {
  const sampler = await Sampler.open(ort, readFileSync(asked.model), asked.plan, asked.shape, {});
  const request = { ...asked.draw, seeds: asked.draw.seeds.map(BigInt) };
  const stages = [];
  const drawn = await sampler.draw(request, { onStage: (done, predicted) => void stages.push(predicted.length) });
  const noise = await sampler.initial(request);
  const [a, b] = [noise.slice(0, sampler.size), noise.slice(sampler.size, 2 * sampler.size)];
  Object.assign(answer, { x_0: encode(drawn), noise: encode(noise), pixels: encode(toPixels(drawn)), stages });
  answer.between = encode(slerp(a, b, 0.25));
  answer.stopped = (await sampler.draw(request, { onStage: () => false })) === null;
}
console.log(JSON.stringify(answer));
