// Whatever has data-pick is a button: by a click, or by Enter or the space bar where the browser has no button there.
const pick = (target) => {
  const chosen = target.closest("[data-pick]");
  if (chosen && element.contains(chosen)) {
    trigger("pick", { pick: chosen.dataset.pick, run: chosen.dataset.run || "" });
    return true;
  }
  return false;
};
element.addEventListener("click", (event) => pick(event.target));
element.addEventListener("keydown", (event) => {
  const key = event.key === "Enter" || event.key === " ";
  if (key && event.target.getAttribute("role") === "button" && pick(event.target)) event.preventDefault();
});
