"use strict";

const at = (id) => document.getElementById(id);
let models = [];

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function ask(path, body) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const found = await answer.json();
  if (!answer.ok) {
    if (answer.status === 401) at("key-row").hidden = false;
    throw new Error(found.error.message);
  }
  return found;
}

async function load() {
  models = (await ask("/v1/models")).data;
  if (!models.length) {
    say("The service is loading its engines…");
    setTimeout(() => load().catch(wrong), 1000);
    return;
  }
  at("model").replaceChildren(...models.map((each) => new Option(each.id)));
  at("model-row").hidden = models.length === 1;
  const asked = new URLSearchParams(location.search);
  if (asked.has("model")) at("model").value = asked.get("model");
  show();
  for (const [name, value] of asked) {
    if (["prompt", "negative", "labels", "n", "steps", "sampler", "guidance", "seed", "first"].includes(name)) at(name).value = value;
  }
  say("Ready.");
  if (asked.has("draw")) await draw();
}

function chosen() {
  return models.find((each) => each.id === at("model").value);
}

function show() {
  const model = chosen();
  at("prompt-row").hidden = at("negative-row").hidden = !model.prompt;
  at("labels-row").hidden = !model.classes.length;
  at("guidance-row").hidden = !model.guidance;
  at("n").max = model.max_images;
  at("steps").max = model.max_steps;
  at("sampler").replaceChildren(...model.samplers.map((each) => new Option(each)));
  at("sampler").value = model.sampler;
  const classes = model.classes.length ? `${model.classes.length}, such as ${model.classes[0]} or ${model.classes.at(-1)}` : "none";
  const kernels = Object.entries(model.kernels).map(([name, count]) => `${count} layers: ${name}`).join("; ");
  const rows = [
    ["Model", `${model.family}, ${model.size}, ${model.precision}`],
    ["Classes", classes],
    ["Runs on", Object.entries(model.runs_on).map(([name, value]) => `${name} ${value}`).join(", ")],
    ["Kernels", kernels],
    ["Drawn together", `at most ${model.max_batch}`],
  ];
  at("runs").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("tr");
    for (const text of [name, value]) row.insertCell().textContent = text;
    return row;
  }));
}

function request() {
  const model = chosen();
  const body = { model: model.id, n: Number(at("n").value), steps: Number(at("steps").value), sampler: at("sampler").value };
  if (model.prompt) body.prompt = at("prompt").value;
  if (model.prompt && at("negative").value) body.negative_prompt = at("negative").value;
  const guidance = Number(at("guidance").value);
  if (model.guidance && guidance !== 1) body.guidance = guidance;
  const labels = at("labels").value.split(/[\s,]+/).filter(Boolean).map(Number);
  if (model.classes.length && labels.length) {
    body.labels = labels.length === 1 ? labels[0] : Array.from({ length: body.n }, (_, i) => labels[i % labels.length]);
  }
  if (at("seed").value.trim()) body.seed = Number(at("seed").value);
  if (Number(at("first").value)) body.first = Number(at("first").value);
  return body;
}

async function draw() {
  at("draw").disabled = true;
  say("Drawing…");
  try {
    const started = performance.now();
    const found = await ask("/v1/images/generations", request());
    const seconds = (performance.now() - started) / 1000;
    at("pictures").replaceChildren(...found.data.map((each) => figure(each, found)));
    say(`${found.data.length} images in ${plain(seconds)} s: ${plain(found.data.length / seconds)} images/s`);
  } catch (error) {
    wrong(error);
  } finally {
    at("draw").disabled = false;
  }
}

function figure(each, found) {
  const frame = document.createElement("figure");
  const picture = document.createElement("img");
  const words = document.createElement("figcaption");
  const label = each.label === null ? "" : `label ${each.label}, `;
  words.textContent = `${label}seed ${each.seed}, image ${each.index}`;
  picture.alt = words.textContent;
  picture.onload = () => picture.classList.toggle("small", picture.naturalWidth < 128);
  picture.src = `data:image/${found.output_format};base64,${each.b64_json}`;
  frame.append(picture, words);
  frame.onclick = () => {
    at("seed").value = each.seed;
    at("first").value = each.index;
    if (each.label !== null) at("labels").value = each.label;
  };
  return frame;
}

function plain(number) {
  return number < 100 ? number.toPrecision(3) : Math.round(number);
}

function wrong(error) {
  say(error.message, true);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("model").addEventListener("change", show);
at("key").addEventListener("change", () => load().catch(wrong));
load().catch(wrong);
