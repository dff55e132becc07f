"use strict";
// Which lines are ported is kept by the browser, by file and text: a new report of the same program keeps the ticks that still apply.
const boxes = [...document.querySelectorAll(".line input")];
const left = document.getElementById("left-to-port");
const stored = (action) => { try { return action(window.localStorage); } catch { return null; } };
const show = () => {
  boxes.forEach((box) => box.closest(".line").classList.toggle("done", box.checked));
  if (left) left.textContent = String(boxes.filter((box) => !box.checked).length);
};
boxes.forEach((box) => {
  box.checked = stored((store) => store.getItem(box.dataset.key)) === "1";
  box.addEventListener("change", () => {
    stored((store) => (box.checked ? store.setItem(box.dataset.key, "1") : store.removeItem(box.dataset.key)));
    show();
  });
});
show();
