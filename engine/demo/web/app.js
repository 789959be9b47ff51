import { Prompts } from "./prompts.js";
import { Sampler, fromPixels, fromSquares, largestDifference, slerp, toPixels } from "./sampler.js";

const $ = (id) => document.getElementById(id);
const RUNTIMES = {
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};
// A function that makes a vector: valid where WebAssembly has SIMD.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11);
const samplers = new Map(), readers = new Map();
const threads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
let site, references, drawn, size, running = Promise.resolve(), latest = 0;

// What is there, what is needed and what to do, as the errors of skipstep.
class Problem extends Error {
  constructor(got, needed, remedy) {
    super(`Got ${got}. Needed: ${needed}. ${remedy}.`);
  }
}

function problem(error) {
  const text = String(error?.message ?? error).slice(0, 300);
  if (error instanceof Problem) return error.message;
  if (/memory|RangeError|bad_alloc|allocation/i.test(`${error?.name} ${text}`)) {
    return new Problem(`too little memory (${text})`, "about 300 MB for a page", "Close other tabs and load this page again").message;
  }
  if ($("provider").value === "webgpu") {
    const remedy = "Choose WebAssembly under “Runs on”, which runs every graph";
    return new Problem(`a graph that WebGPU does not run here (${text})`, "a provider with its operators", remedy).message;
  }
  return new Problem(text, "a page as make demo serves it", "Load this page again").message;
}

function report(error) {
  console.warn(error);
  $("error").textContent = problem(error);
  $("error").hidden = false;
  $("runtime").textContent = "";
}

async function fetched(name) {
  const response = await fetch(name).catch((error) => ({ ok: false, statusText: error.message }));
  if (!response.ok) {
    throw new Problem(`no ${name} (${response.status ?? response.statusText})`, "the server of make demo", "Start make demo again and load this page");
  }
  return response;
}

const bytes = async (name) => new Uint8Array(await (await fetched(name)).arrayBuffer());

async function runtime(provider) {
  const [module, wasm] = RUNTIMES[provider];
  const ort = await import(`./ort/${module}`);
  ort.env.wasm.wasmPaths = { wasm: new URL(`ort/${wasm}`, location).href };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

async function promptsOf(about) {
  const provider = $("provider").value;
  if (!readers.has(provider)) {
    const [contents, graph] = [await (await fetched(about.tokenizer)).json(), await bytes(about.encoder)];
    readers.set(provider, await Prompts.open(await runtime(provider), contents, graph, about));
  }
  return readers.get(provider);
}

async function samplerOf(plan, { inverted = false, shape = site.shape } = {}) {
  const provider = $("provider").value, name = `graphs/${plan.key}${inverted ? "-inverted" : ""}.onnx`, key = provider + name;
  if (!samplers.has(key)) {
    const ort = await runtime(provider), model = await bytes(name);
    samplers.set(key, await Sampler.open(ort, model, plan, shape, { executionProviders: [provider], logSeverityLevel: 3 }));
  }
  $("runtime").textContent = provider === "webgpu" ? "Runs on WebGPU, and on WebAssembly what it lacks."
    : `Runs on WebAssembly with SIMD, ${threads === 1 ? "one thread" : `${threads} threads`}.`;
  return samplers.get(key);
}

// One after the other; of several that wait, the last. `work` is given a test of whether another one waits.
function run(work) {
  const turn = ++latest, current = () => turn === latest;
  running = running.then(async () => {
    if (!current()) return;
    $("error").hidden = true;
    document.body.ariaBusy = "true";
    await work(current).catch(report);
    document.body.ariaBusy = "false";
  });
  return running;
}

// Draws with the page free to paint in between. Returns the samples, or null where another drawing waits, and the time.
async function timed(sampler, request, current, { x_T, show = () => {} } = {}) {
  let spent = 0, since = performance.now();
  const onStage = async (done, predicted) => {
    spent += performance.now() - since;
    show(done, predicted);
    await new Promise((resolve) => setTimeout(resolve));
    since = performance.now();
    return current();
  };
  return { samples: await sampler.draw(request, { x_T, onStage }), spent };
}

function paint(canvas, samples, label) {
  const { width, height } = canvas, size = width * height, image = new ImageData(width, height);
  const pixels = toPixels(samples), blue = pixels.length - size, green = blue / 2;
  for (let i = 0; i < size; i++) image.data.set([pixels[i], pixels[green + i], pixels[blue + i], 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  if (label) canvas.setAttribute("aria-label", label);
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const planOf = () => site.plans[$("plan").selectedIndex];
const className = (label) => site.classes[label];
const compared = (seed, label) => seed < site.references && seed === label && Number($("guidance").value) === site.guidance;

function seedOf(input) {
  const text = input.value.trim();
  const good = /^[0-9]{1,20}$/.test(text) && BigInt(text) < 1n << 64n;
  input.setCustomValidity(good ? "" : "A whole number from 0 to 18446744073709551615");
  return input.reportValidity() ? BigInt(text) : null;
}

function request(seeds, labels, guidance = Number($("guidance").value)) {
  return { seeds, labels, guidance };
}

function differenceFromReference(samples, index) {
  const start = ($("plan").selectedIndex * site.references + index) * size;
  return largestDifference(toPixels(samples), references.subarray(start, start + size));
}

function tell(most, what) {
  $("check").classList.toggle("differs", most > 1);
  $("check").textContent = most > 1 ? `Not ${what} of make sample: the largest difference is ${most} of 255.`
    : `The same as ${what} of make sample: the largest difference is ${most} of 255.`;
}

async function drawOne(current) {
  const seed = seedOf($("seed")), label = $("class").selectedIndex, plan = planOf();
  if (seed === null) return;
  const sampler = await samplerOf(plan);
  $("progress").max = plan.evaluations;
  const show = (done, predicted) => {
    $("progress").value = done;
    paint($("picture"), predicted);
  };
  const { samples, spent } = await timed(sampler, request([seed], [label]), current, { show });
  if (!samples) return;
  drawn = samples;
  paint($("picture"), samples, `${className(label)}, seed ${seed}, ${plan.evaluations} steps`);
  $("timing").textContent = `${milliseconds(spent)} for the image: ${plan.evaluations} evaluations of ${milliseconds(spent / plan.evaluations)}.`;
  if (compared(Number(seed), label)) return tell(differenceFromReference(samples, label), "the picture");
  $("check").classList.remove("differs");
  $("check").textContent = `To compare with make sample, choose a class by its number, its number as the seed, and guidance ${site.guidance}: ${className(0)} with seed 0, ${className(1)} with seed 1, and so on.`;
}

async function drawTen(current) {
  const plan = planOf(), sampler = await samplerOf(plan), count = site.references;
  const strip = $("ten"), labels = [...Array(count).keys()];
  $("guidance").value = site.guidance;
  $("guidance").dispatchEvent(new Event("input"));
  if (!strip.children.length) {
    for (const label of labels) {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas");
      Object.assign(canvas, { width: site.shape[2], height: site.shape[1] });
      canvas.setAttribute("role", "img");
      figure.append(canvas, Object.assign(document.createElement("figcaption"), { textContent: className(label) }));
      strip.append(figure);
    }
  }
  strip.hidden = false;
  const each = (samples, name) => strip.querySelectorAll("canvas").forEach((canvas, i) => paint(canvas, samples.subarray(i * size, (i + 1) * size), name?.(i)));
  $("progress").max = plan.evaluations;
  const show = (done, predicted) => {
    $("progress").value = done;
    each(predicted);
  };
  const { samples, spent } = await timed(sampler, request(labels.map(BigInt), labels), current, { show });
  if (!samples) return;
  each(samples, (i) => `${className(i)}, seed ${i}`);
  $("timing").textContent = `${milliseconds(spent / count)} an image, ${count} together.`;
  tell(Math.max(...labels.map((i) => differenceFromReference(samples.subarray(i * size, (i + 1) * size), i))), "the pictures");
}

async function drawPrompt(current) {
  const about = site.prompted, seed = seedOf($("prompt-seed")), plan = about.plans[$("prompt-plan").selectedIndex];
  if (seed === null) return;
  const prompt = $("prompt").value, { conditions, cut } = await (await promptsOf(about)).read(prompt);
  const sampler = await samplerOf(plan, about), picture = (samples) => fromSquares(samples, about.shape, about.factor);
  $("prompt-cut").textContent = cut ? `The text encoder reads ${about.length - 2} tokens of it: ${cut} are cut off.` : "";
  $("prompt-progress").max = plan.evaluations;
  const show = (done, predicted) => {
    $("prompt-progress").value = done;
    paint($("prompt-picture"), picture(predicted));
  };
  const asked = { seeds: [seed], conditions, guidance: Number($("prompt-guidance").value) };
  const { samples, spent } = await timed(sampler, asked, current, { show });
  if (!samples) return;
  paint($("prompt-picture"), picture(samples), `${prompt}, seed ${seed}, ${plan.evaluations} steps`);
  $("prompt-timing").textContent = `${milliseconds(spent)} for the image: ${plan.evaluations} evaluations of ${milliseconds(spent / plan.evaluations)}.`;
}

async function drawBetween(current) {
  const a = seedOf($("seed-a")), b = seedOf($("seed-b")), label = $("class").selectedIndex, weight = Number($("weight").value) / 100;
  if (a === null || b === null) return;
  const sampler = await samplerOf(planOf());
  const noise = await sampler.initial(request([a, b], [label, label]));
  const x_T = slerp(noise.subarray(0, size), noise.subarray(size), weight);
  const show = (done, predicted) => paint($("between-picture"), predicted);
  const { samples, spent } = await timed(sampler, request([a], [label]), current, { x_T, show });
  if (!samples) return;
  const percent = `${Math.round(100 * weight)} %`;
  paint($("between-picture"), samples, `${className(label)}, ${percent} of the way from seed ${a} to seed ${b}`);
  $("between-timing").textContent = `${percent} of the way, ${milliseconds(spent)}.`;
}

async function invert(image, current) {
  const chosen = planOf(), plan = chosen.inverted ? chosen : site.plans.find((each) => each.inverted && each.steps === 20);
  const label = $("class").selectedIndex, asked = request([0n], [label], 1);
  paint($("given"), image, `The picture, taken as ${className(label)}`);
  const up = await timed(await samplerOf(plan, { inverted: true }), asked, current, { x_T: image, show: (done, predicted) => paint($("noise"), predicted) });
  if (!up.samples) return;
  // Normals are within ±3, pixels within ±1.
  paint($("noise"), up.samples.map((value) => value / 3), "The noise that the picture comes from");
  const show = (done, predicted) => paint($("again"), predicted);
  const down = await timed(await samplerOf(plan), asked, current, { x_T: up.samples, show });
  if (!down.samples) return;
  paint($("again"), down.samples, "The picture, drawn again from its noise");
  const squares = down.samples.reduce((sum, value, i) => sum + (value - image[i]) ** 2, 0);
  $("invert-timing").textContent = `${plan.evaluations} steps up and down in ${milliseconds(up.spent + down.spent)}; drawn again, a pixel differs by ${(127.5 * Math.sqrt(squares / size)).toFixed(1)} of 255 (root mean square).`;
}

// Grey, as bright as the training pictures: light clothes on black.
async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem(`${file.name}, which the browser cannot read`, "a picture, such as PNG or JPEG", "Choose another file");
  });
  const [, height, width] = site.shape, scale = Math.min(width / bitmap.width, height / bitmap.height);
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  context.fillStyle = $("negative").checked ? "#fff" : "#000";
  context.fillRect(0, 0, width, height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, width, height);
  return fromPixels(Array.from({ length: size }, (_, i) => {
    const grey = 0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2];
    return $("negative").checked ? 255 - grey : grey;
  }));
}

async function invertUpload() {
  const [file] = $("upload").files;
  if (file) await run(async (current) => invert(await readPicture(file), current));
}

async function start() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new Problem("a browser without WebAssembly SIMD", "Chrome or Edge 91, Firefox 89, Safari 16.4, or later", "Update the browser, or draw on the command line: make sample");
  }
  site = await (await fetched("site.json")).json();
  references = await bytes("references.bin");
  size = site.shape.reduce((a, b) => a * b, 1);
  $("class").append(...site.classes.map((name, i) => new Option(`${i} ${name}`, i)));
  const planOption = (plan) => new Option(`${plan.steps}${plan.fitted ? ", a tuned plan" : ", DDIM"}`, plan.key, false, plan.steps === 10);
  $("plan").append(...site.plans.map(planOption));
  $("guidance").value = site.guidance;
  if (site.prompted) {
    const [, height, width] = site.prompted.shape.map((side) => side * site.prompted.factor);
    Object.assign($("prompt-picture"), { width, height });
    $("prompt-plan").append(...site.prompted.plans.map(planOption));
    $("prompt-guidance").value = site.prompted.guidance;
    $("words").hidden = false;
  }
  const oneDigit = (value) => Number(value).toFixed(1);
  for (const [input, text] of [["guidance", oneDigit], ["prompt-guidance", oneDigit], ["weight", (value) => `${value} %`]]) {
    const tellValue = () => ($(`${input}-value`).value = text($(input).value));
    $(input).addEventListener("input", tellValue);
    tellValue();
  }
  $("draw").addEventListener("submit", (event) => (event.preventDefault(), run(drawOne)));
  $("draw-ten").addEventListener("click", () => run(drawTen));
  $("prompted").addEventListener("submit", (event) => (event.preventDefault(), run(drawPrompt)));
  $("between").addEventListener("submit", (event) => (event.preventDefault(), run(drawBetween)));
  $("between").addEventListener("input", () => run(drawBetween));
  $("upload").addEventListener("change", invertUpload);
  $("negative").addEventListener("change", invertUpload);
  $("invert-drawn").addEventListener("click", () => drawn && run((current) => invert(drawn, current)));
  if (await navigator.gpu?.requestAdapter().catch(() => null)) {
    Object.assign($("provider").options[1], { disabled: false, text: "WebGPU" });
  }
  await run(drawOne);
}

start().catch(report);
