// Paints a mask over a picture, pixel by pixel of the picture, with mouse, finger or keys. After each stroke the mask is
// handed over as lengths of runs, row by row: so many pixels outside, so many inside, and so on.
const root = element.querySelector(".ik-painter");
const UNDO = 30;

const make = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

const unpack = (lengths, size) => {
  const mask = new Uint8Array(size);
  let at = 0;
  lengths.forEach((length, place) => {
    if (place % 2) mask.fill(1, at, at + length);
    at += length;
  });
  return mask;
};

const pack = (mask) => {
  const lengths = [];
  let [value, start] = [0, 0];
  for (let at = 0; at < mask.length; at++) {
    if (mask[at] !== value) {
      lengths.push(at - start);
      [value, start] = [mask[at], at];
    }
  }
  lengths.push(mask.length - start);
  return lengths;
};

const build = () => {
  const spec = props.value;
  root.replaceChildren();
  if (!spec || !spec.width) return;
  const { width, height } = spec;
  let mask = unpack(spec.mask, width * height);
  const before = [];
  const colour = [1, 3, 5].map((place) => parseInt(spec.colour.slice(place, place + 2), 16));

  const canvas = make("canvas", {
    width, height, tabindex: "0", role: "img",
    "aria-label": `Outline of ${spec.label}. Paint on the picture; or move with the arrow keys and paint with the space bar.`,
  });
  const context = canvas.getContext("2d");
  const add = make("input", { type: "radio", name: "ik-mode", value: "add", checked: "" });
  const remove = make("input", { type: "radio", name: "ik-mode", value: "remove" });
  const most = Math.max(2, Math.round(Math.max(width, height) / 8));
  const brush = make("input", { type: "range", min: "0.5", max: String(most), step: "0.5", value: String(most / 3) });
  const undo = make("button", { type: "button" }, "Undo");
  root.append(
    make("div", { class: "ik-tools", role: "group", "aria-label": "Brush" },
      make("label", {}, add, " add"), make("label", {}, remove, " remove"),
      make("label", {}, "brush ", brush), undo),
    canvas,
  );

  const picture = new Image();
  let cursor = null;
  const show = () => {
    context.clearRect(0, 0, width, height);
    context.drawImage(picture, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let at = 0; at < mask.length; at++) {
      for (let channel = 0; channel < 3; channel++) {
        const place = 4 * at + channel;
        pixels.data[place] = mask[at]
          ? 0.45 * pixels.data[place] + 0.55 * colour[channel]
          : 0.75 * pixels.data[place] + 0.25 * 255;
      }
    }
    context.putImageData(pixels, 0, 0);
    if (cursor) {
      context.strokeStyle = "#000";
      context.lineWidth = Math.max(0.5, width / 200);
      context.beginPath();
      context.arc(cursor[0], cursor[1], Math.max(0.5, Number(brush.value)), 0, 2 * Math.PI);
      context.stroke();
    }
  };
  picture.onload = show;
  picture.src = spec.picture;

  const dab = (x, y) => {
    const radius = Number(brush.value);
    for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(height - 1, Math.ceil(y + radius)); row++) {
      for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(width - 1, Math.ceil(x + radius)); column++) {
        const near = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= Math.max(radius, 0.71) ** 2;
        if (near) mask[row * width + column] = add.checked ? 1 : 0;
      }
    }
  };
  const line = (from, to) => {
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let step = 0; step <= steps; step++) {
      dab(from[0] + ((to[0] - from[0]) * step) / steps, from[1] + ((to[1] - from[1]) * step) / steps);
    }
    show();
  };
  const remember = () => {
    before.push(mask.slice());
    if (before.length > UNDO) before.shift();
  };
  const keep = () => trigger("keep", { mask: pack(mask), object: spec.object });
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
  };

  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    remember();
    cursor = null;
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const now = place(event);
    line(last, now);
    last = now;
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, () => {
      if (last) keep();
      last = null;
    });
  }
  canvas.addEventListener("keydown", (event) => {
    const step = Math.max(1, Math.round(Number(brush.value)));
    const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (move) {
      const [x, y] = cursor || [width / 2, height / 2];
      cursor = [Math.min(width, Math.max(0, x + move[0])), Math.min(height, Math.max(0, y + move[1]))];
      show();
    } else if (event.key === " " && cursor) {
      remember();
      line(cursor, cursor);
      keep();
    } else return;
    event.preventDefault();
  });
  undo.addEventListener("click", () => {
    if (!before.length) return;
    mask = before.pop();
    show();
    keep();
  });
};

watch("value", build);
build();
