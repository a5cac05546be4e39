// The page of `anyflow play`: it shows the chunks of the stream, and tells the server what is held. Nothing else is asked.
"use strict";

const $ = (id) => document.getElementById(id);
const screen = $("picture").getContext("2d");
const DEAD_ZONE = 0.15; // of a stick at rest
const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", ShiftLeft: "⇧" };
const CROSS = { 12: "ArrowUp", 13: "ArrowDown", 14: "ArrowLeft", 15: "ArrowRight" }; // a gamepad's buttons

const wish = { number: 0, sticks: [0, 0], sliders: {}, steps: 2, paused: false, shown: 0, run: 0, start: 0, film: 0 };
const held = { keyboard: new Set(), gamepad: new Set() };
const tapped = new Set(); // pressed since the last request, let go or not
let facts = null;
let used = new Set(); // keys that move something
const buttons = []; // { button, codes }: what shows that a key is held, before any picture answers it

// --- wishes: one request at a time, always the newest state ----------------------------------------------------------

let isSending = false;
let isStale = false;
let press = null; // { number, at }: the wish of the first key that no picture has answered yet

async function tell() {
  isStale = true;
  if (isSending || !facts) return;
  isSending = true;
  while (isStale) {
    isStale = tapped.size > 0; // a tap is told as held, then as let go
    const keys = [...new Set([...held.keyboard, ...held.gamepad, ...tapped])];
    tapped.clear();
    wish.number += 1;
    const body = JSON.stringify({ ...wish, keys, seat: facts.seat });
    try {
      const answer = await fetch("wish", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      if (!answer.ok) say(await answer.text());
    } catch {
      break; // the stream says that the command has ended
    }
  }
  isSending = false;
}

function pressed(code, by) {
  if (held[by].has(code)) return;
  held[by].add(code);
  tapped.add(code);
  press ??= { number: wish.number + 1, at: performance.now() };
  showHeld();
  tell();
}

function released(code, by) {
  if (!held[by].delete(code)) return;
  showHeld();
  tell();
}

function showHeld() {
  const isHeld = (code) => held.keyboard.has(code) || held.gamepad.has(code);
  for (const { button, codes } of buttons) button.setAttribute("aria-pressed", codes.some(isHeld));
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.type === "range" && event.code.startsWith("Arrow")) return; // they move the slider
  if (used.has(event.code)) {
    event.preventDefault(); // arrows and the space bar scroll otherwise
    pressed(event.code, "keyboard");
  } else if (!event.repeat && event.code === "KeyP") {
    pause(!wish.paused);
  } else if (!event.repeat && event.code === "KeyR") {
    restart(wish.start);
  }
});
addEventListener("keyup", (event) => released(event.code, "keyboard"));
addEventListener("blur", () => { // keys that are let go elsewhere are not heard
  held.keyboard.clear();
  showHeld();
  tell();
});

function readGamepad() {
  const pad = (navigator.getGamepads?.() ?? []).find((one) => one);
  if (!pad) return;
  const stick = (value) => (Math.abs(value ?? 0) < DEAD_ZONE ? 0 : Math.round(value * 20) / 20);
  const sticks = [stick(pad.axes[0]), -stick(pad.axes[1])];
  if (sticks.some((value, axis) => value !== wish.sticks[axis])) {
    if (wish.sticks.every((value) => value === 0)) press ??= { number: wish.number + 1, at: performance.now() };
    wish.sticks = sticks;
    tell();
  }
  const shown = facts.levers.filter((lever, place) => !$(`lever-${place}`).hidden);
  const keys = shown.filter((lever) => lever.kind === "key").map((lever) => lever.more[0]);
  pad.buttons.forEach((button, number) => {
    const code = CROSS[number] ?? keys[number];
    if (code) (button.pressed ? pressed : released)(code, "gamepad");
  });
}

// --- the stream: lines of JSON, one a chunk ---------------------------------------------------------------------------

const queue = []; // frames to show, in order
let shownRun = 0;
let nextAt = 0;
const shownAt = []; // when the last frames were shown

async function listen() {
  for (let isOver = false; !isOver; await new Promise((done) => setTimeout(done, 2000))) {
    try {
      const answer = await fetch("stream", { cache: "no-store" });
      if (answer.ok) isOver = await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      else over(await answer.text());
    } catch {
      over("The command has ended, or cannot be reached: start it again, and open the address that it prints.");
    }
  }
}

async function read(lines) {
  for (let rest = "", isOver = false; ; ) {
    const { value, done } = await lines.read();
    if (done) return isOver;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = JSON.parse(part);
      if (line.kind === "facts") begin(line);
      else if (line.kind === "chunk") await arrive(line);
      else if (line.kind === "film") film(line);
      else if (line.kind === "over") {
        isOver = true;
        over("The command has ended.");
      }
    }
  }
}

async function picture(jpeg) {
  const image = new Image();
  image.src = `data:image/jpeg;base64,${jpeg}`;
  await image.decode();
  return image;
}

async function arrive(chunk) {
  const images = await Promise.all(chunk.frames.map(picture));
  if (chunk.run !== wish.run) return; // of before a restart
  if (chunk.run !== shownRun) {
    queue.length = 0;
    shownRun = chunk.run;
    nextAt = 0;
  }
  const seconds = chunk.seconds / images.length;
  images.forEach((image, place) => {
    queue.push({ image, seconds, values: chunk.values[place], chunk: place ? null : chunk });
  });
}

function show(now) {
  requestAnimationFrame(show);
  if (!facts) return;
  readGamepad();
  if (!queue.length || now < nextAt || wish.paused) return;
  const frame = queue.shift();
  nextAt = (now - nextAt < 100 ? nextAt : now) + 1000 * frame.seconds; // a wait is not made up for
  screen.drawImage(frame.image, 0, 0, $("picture").width, $("picture").height);
  shownAt.push(now);
  if (frame.chunk) beginChunk(frame.chunk, now);
  frame.values.forEach(showValue);
}

function beginChunk(chunk, now) {
  if (chunk.start !== null) showLevers(facts.starts[chunk.start].domain);
  wish.shown = chunk.number;
  tell();
  over("");
  if (press && chunk.wish >= press.number) {
    $("latency").textContent = `${Math.round(now - press.at)} ms`;
    press = null;
  }
  $("rate").textContent = chunk.rate ? `${chunk.rate.toFixed(1)} fps` : "–";
  $("steps-now").textContent = chunk.steps;
  const slow = `The model makes ${chunk.rate.toFixed(1)} of the footage’s ${facts.fps} frames a second: it plays slower.`;
  say(chunk.is_behind ? `${slow} A key still acts in the next chunk.` : "");
}

setInterval(() => { // frames of the last two seconds
  const now = performance.now();
  while (shownAt.length && shownAt[0] < now - 2000) shownAt.shift();
  $("fps").textContent = shownAt.length > 1 ? `${(shownAt.length / 2).toFixed(1)} fps` : "–";
}, 500);

// --- the page ---------------------------------------------------------------------------------------------------------

const say = (text) => { $("said").textContent = text; };
const over = (text) => { $("over").textContent = text; };
const named = (code) => NAMES[code] ?? code.replace(/^(Key|Digit)/, "");

function begin(line) {
  facts = line;
  Object.assign(wish, { number: 0, shown: 0, run: 0, film: 0, paused: false, steps: facts.steps });
  [queue.length, shownRun, press] = [0, 0, null];
  const [width, height] = facts.size;
  Object.assign($("picture"), { width, height });
  $("picture").style.maxWidth = `calc(72vh * ${width / height})`;
  $("model").textContent = `${facts.model} · ${facts.size.join(" × ")} pixels, ${facts.fps} frames a second`;
  $("notes").replaceChildren(...facts.notes.map((note) => element("li", { textContent: note })));
  $("steps").max = facts.all_steps.length - 1;
  $("steps").value = facts.all_steps.indexOf(facts.steps);
  $("all-steps").replaceChildren(...facts.all_steps.map((count) => element("span", { textContent: count })));
  used = new Set(facts.levers.flatMap((lever) => [...lever.more, ...lever.less]));
  $("levers").replaceChildren(...facts.levers.map(leverRow));
  showLevers(facts.starts[0].domain);
  $("starts").replaceChildren(...facts.starts.map(startButton));
  film({ said: "", is_recording: false });
  pause(false);
  over("Loading the model …");
  const first = facts.starts[0].jpeg; // something to see while the model is loaded
  if (first) picture(first).then((image) => screen.drawImage(image, 0, 0, ...facts.size));
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function keyButton(codes) {
  const code = codes[0];
  const button = element("button", { className: "key", textContent: named(code), title: `held: ${named(code)}` });
  button.addEventListener("pointerdown", (event) => {
    button.setPointerCapture(event.pointerId);
    pressed(code, "keyboard");
  });
  for (const end of ["pointerup", "pointercancel"]) button.addEventListener(end, () => released(code, "keyboard"));
  buttons.push({ button, codes });
  return button;
}

function leverRow(lever, place) {
  const unit = lever.unit ? ` ${lever.unit}` : "";
  const value = element("output", { id: `value-${place}`, textContent: "–" });
  const name = element("div", { className: "name" }, element("span", { textContent: lever.label + unit }), value);
  if (lever.is_state) name.firstChild.append(" (a state: not for keys)");
  const { low, high } = lever;
  let middle;
  if (lever.kind === "slider") {
    const step = (high - low) / 100 || "any";
    middle = element("input", { type: "range", min: low, max: high, step, value: lever.begin, ariaLabel: lever.label });
    middle.addEventListener("input", () => {
      wish.sliders[place] = Number(middle.value);
      tell();
    });
  } else {
    const dot = element("span", { className: "dot", id: `dot-${place}` });
    const rest = element("span", { className: "rest", hidden: lever.rest === null });
    rest.style.left = percent(lever.rest ?? low, lever);
    middle = element("div", { className: lever.kind === "key" ? "" : "track" }, ...(lever.kind === "key" ? [] : [rest, dot]));
  }
  const keys = [lever.less, lever.more].map((codes) => (codes.length ? [keyButton(codes)] : []));
  return element("div", { className: "lever", id: `lever-${place}` }, name, element("div", { className: "move" }, ...keys[0], middle, ...keys[1]));
}

function showLevers(domain) {
  facts.levers.forEach((lever, place) => {
    $(`lever-${place}`).hidden = lever.domain !== "" && lever.domain !== domain;
  });
}

const percent = (value, { low, high }) => `${(100 * (value - low)) / (high - low || 1)}%`;

function showValue(value, place) {
  const lever = facts.levers[place];
  const told = lever.kind === "key" ? (value ? "held" : "") : value?.toFixed(lever.high - lever.low < 5 ? 2 : 1);
  $(`value-${place}`).textContent = value === null ? "–" : told;
  const dot = $(`dot-${place}`);
  if (dot && value !== null) dot.style.left = percent(value, lever);
}

function startButton(start, place) {
  const button = element("button", { title: `Start from ${start.label}`, textContent: start.jpeg ? "" : start.label });
  if (start.jpeg) picture(start.jpeg).then((image) => button.append(Object.assign(image, { alt: start.label })));
  button.addEventListener("click", () => restart(place));
  return button;
}

function restart(start) {
  Object.assign(wish, { run: wish.run + 1, start });
  pause(false);
}

function pause(isPaused) {
  wish.paused = isPaused;
  $("pause").textContent = isPaused ? "Go on" : "Pause";
  $("pause").setAttribute("aria-pressed", isPaused);
  tell();
}

function film(line) {
  if (line.said) $("film").textContent = line.said;
  if (!line.is_recording && wish.film % 2) wish.film += 1; // it ended by itself: the disk is full
  $("record").textContent = line.is_recording ? "Stop recording" : "Record";
  $("record").setAttribute("aria-pressed", line.is_recording);
}

$("pause").addEventListener("click", () => pause(!wish.paused));
$("again").addEventListener("click", () => restart(wish.start));
$("record").addEventListener("click", () => {
  wish.film += 1; // odd: a film is being written
  tell();
});
$("steps").addEventListener("input", () => {
  wish.steps = facts.all_steps[$("steps").value];
  tell();
});
addEventListener("pointerup", () => document.activeElement?.blur()); // keys steer again, after a click

requestAnimationFrame(show);
listen();
