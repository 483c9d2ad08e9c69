// The page: reads pictures that are dropped, chosen or pasted, runs the model on them and shows what it says. It stands
// behind resize.js in one module.

const SHOWN = 5; // classes of a picture
const MOST_PIXELS = 100e6; // of a picture, as where the run reads them
const page = JSON.parse(document.getElementById("page").textContent);
const find = (name, within = document) => within.querySelector(name);

// An error whose message is for the reader.
class Failure extends Error {}

// --- The model -------------------------------------------------------------------------------------------------------

// The bytes of a script element with base64, which is taken out of the page to free its memory.
function bytesOf(id) {
  const element = document.getElementById(id);
  const text = element.textContent;
  element.remove();
  const bytes = new Uint8Array((text.length / 4) * 3 - text.match(/=*$/)[0].length);
  const step = 2 ** 18; // characters at a time, a multiple of four; a string of them all would be as large as the model
  for (let at = 0, out = 0; at < text.length; at += step) {
    const part = atob(text.slice(at, at + step));
    for (let i = 0; i < part.length; i++) bytes[out++] = part.charCodeAt(i);
  }
  return bytes;
}

async function unpacked(id) {
  const stream = new Blob([bytesOf(id)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function fetched({ name, integrity }) {
  const url = page.runtime.base + name;
  try {
    const response = await fetch(url, { integrity, credentials: "omit", referrerPolicy: "no-referrer" });
    if (response.ok) return await response.arrayBuffer();
  } catch {
    // For a file that is not the right one and for no answer at all, a browser raises the same error.
  }
  const answers = await fetch(url, { method: "HEAD", credentials: "omit" }).then(({ ok }) => ok, () => false);
  const { host } = new URL(url);
  throw new Failure(
    answers
      ? `${name} from ${host} is not the file that this page was made with (checksum mismatch), so it is not run. ` +
        "Export the page again with the runtime built in (--ort-web DIR)."
      : `${host} cannot be reached, from which this page fetches what runs the model (${name}). Connect to the ` +
        "internet and load the page again, or export it again with the runtime built in (--ort-web DIR).",
  );
}

async function load() {
  if (typeof WebAssembly !== "object") {
    throw new Failure("This browser has no WebAssembly, which the model needs. Open the page in a current browser.");
  }
  await new Promise((resolve) => setTimeout(resolve, 30)); // for the page to be painted first
  const { files } = page.runtime;
  const get = page.runtime.base ? fetched : ({ id }) => unpacked(id);
  const [module, wasm] = await Promise.all([get(files.module), get(files.wasm)]);
  const url = URL.createObjectURL(new Blob([module], { type: "text/javascript" }));
  const ort = await import(url);
  URL.revokeObjectURL(url);
  // More threads would need a server that isolates the page from others.
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: wasm });
  const session = await ort.InferenceSession.create(bytesOf("model"), { executionProviders: ["wasm"] });
  return async (pixels, side) => {
    const image = new ort.Tensor("uint8", pixels, [1, side, side, 3]);
    const { probabilities } = await session.run({ image }, ["probabilities"]);
    return Array.from(probabilities.data);
  };
}

const model = load().catch((error) => {
  throw error instanceof Failure
    ? error
    : new Failure(`The model cannot be run in this browser (${error.message}). Open the page in a current browser.`);
});

// --- Pictures --------------------------------------------------------------------------------------------------------

// The pixels of a file that the network takes, [side, side, 3], and the size of its picture.
async function pixelsOf(file) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options).catch(() => {
    throw new Failure(
      `${file.name || "This"} is not a picture that this browser can read. Choose a JPEG, PNG or WebP file.`,
    );
  });
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new Failure(`${file.name} has ${width} × ${height} pixels, too many for this page. Make it smaller.`);
  }
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true, alpha: false });
  const read = (left, top, columns, rows) => {
    Object.assign(context.canvas, { width: columns, height: rows });
    context.fillStyle = "white"; // behind transparent parts
    context.fillRect(0, 0, columns, rows);
    context.drawImage(bitmap, -left, -top);
    return context.getImageData(0, 0, columns, rows).data;
  };
  const pixels = resized(planOf(width, height, page.resize), read);
  bitmap.close();
  return { pixels, width, height };
}

// Says what a file shows: `{best, seconds, pixels, width, height}`, best being the likeliest classes.
async function classify(file) {
  const run = await model;
  const start = performance.now();
  const picture = await pixelsOf(file);
  const probabilities = await run(picture.pixels, page.resize.side);
  const seconds = (performance.now() - start) / 1000;
  const best = probabilities
    .map((probability, label) => ({ name: page.class_names[label], probability }))
    .sort((a, b) => b.probability - a.probability);
  return { ...picture, seconds, best };
}

// --- What is shown ---------------------------------------------------------------------------------------------------

function percent(probability) {
  if (probability < 0.0005) return "< 0.1\u00a0%";
  return `${(100 * probability).toFixed(1)}\u00a0%`;
}

function card(file) {
  const element = find("#result").content.cloneNode(true).firstElementChild;
  find(".file", element).textContent = file.name;
  const image = find("img", element);
  image.addEventListener("error", () => image.parentElement.remove());
  image.alt = file.name ? `The picture ${file.name}` : "The picture";
  image.src = URL.createObjectURL(file);
  return element;
}

function showResult(element, { best, seconds, pixels, width, height }) {
  find(".answer", element).textContent = best[0].name;
  const bars = find(".bars", element);
  for (const { name, probability } of best.slice(0, SHOWN)) {
    const bar = find("#bar").content.cloneNode(true).firstElementChild;
    find(".name", bar).textContent = name;
    find(".percent", bar).textContent = percent(probability);
    bar.dataset.probability = probability;
    find(".filled", bar).style.width = `${100 * probability}%`;
    bars.append(bar);
  }
  const { side } = page.resize;
  const seen = find("canvas", element);
  Object.assign(seen, { width: side, height: side });
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    image.data.set(pixels.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  seen.getContext("2d").putImageData(image, 0, 0);
  find(".facts", element).textContent = `Classified in ${seconds.toFixed(2)}\u00a0s from ${width}\u00a0×\u00a0${height}.`;
  element.dataset.state = "done";
  return `${find(".file", element).textContent}: ${best[0].name}, ${percent(best[0].probability)}`;
}

function showFailure(element, error) {
  const text =
    document.body.dataset.model === "failed"
      ? "Not classified, as the model cannot be run; the reason is above."
      : error instanceof Failure
        ? error.message
        : `This picture cannot be classified (${error.message}).`;
  find(".error", element).textContent = text;
  element.dataset.state = "failed";
  return text;
}

let last = Promise.resolve(); // pictures are classified one after the other

function take(files) {
  if (!files.length) return;
  const cards = files.map((file) => [file, card(file)]);
  find("#results").prepend(...cards.map(([, element]) => element));
  document.body.classList.add("has-results");
  cards[0][1].scrollIntoView({ block: "nearest" });
  const live = find("#live");
  for (const [file, element] of cards) {
    last = last.then(async () => {
      await new Promise((resolve) => setTimeout(resolve)); // for the page to be painted meanwhile
      if (!element.isConnected) return; // cleared
      const said = await classify(file).then(
        (result) => showResult(element, result),
        (error) => showFailure(element, error),
      );
      if (element.isConnected) live.textContent = said;
    });
  }
}

// --- Ways to hand over a picture -------------------------------------------------------------------------------------

const input = find("#file");
input.addEventListener("change", () => {
  take([...input.files]);
  input.value = ""; // so that the same file can be chosen again
});
addEventListener("paste", (event) => take([...event.clipboardData.files]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take([...event.dataTransfer.files]);
});

find("#clear").addEventListener("click", () => {
  for (const image of document.querySelectorAll(".card figure img")) {
    const { src } = image;
    image.removeAttribute("src"); // which may still be loading
    URL.revokeObjectURL(src);
  }
  find("#results").replaceChildren();
  document.body.classList.remove("has-results");
  find("#live").textContent = "The results are cleared.";
  input.focus(); // else it would be lost with the button
});

model.then(
  () => (document.body.dataset.model = "ready"),
  (error) => {
    document.body.dataset.model = "failed";
    find("#failure").textContent = error.message;
  },
);
