// A concept that is pointed at, or reached by the keyboard, is shown in the picture.
const ofConcepts = document.querySelectorAll("[data-concept]");
const show = (index) =>
  ofConcepts.forEach((one) => one.classList.toggle("shown", index !== null && one.dataset.concept === index));
for (const one of ofConcepts) {
  for (const event of ["pointerenter", "focus"]) one.addEventListener(event, () => show(one.dataset.concept));
  for (const event of ["pointerleave", "blur"]) one.addEventListener(event, () => show(null));
}
for (const code of document.querySelectorAll("[data-copy]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.setAttribute("aria-label", "Copy " + code.dataset.copy);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent.trim());
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => (button.textContent = "copy"), 1600);
  });
  code.after(button);
}
