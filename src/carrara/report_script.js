"use strict";
// Without this script every epoch is a section to open and every chart carries its final values; with it, a slider
// walks through the epochs and the legend follows the pointer.
for (const box of document.querySelectorAll(".epochs")) {
  const player = box.querySelector(".player");
  if (!player) continue;
  const epochs = [...box.querySelectorAll(".epoch")].reverse();
  const [button, slider, output] = player.children;
  let timer = 0;
  const show = () => {
    epochs.forEach((epoch, index) => { epoch.open = index === Number(slider.value); });
    output.value = epochs[slider.value].querySelector("summary").textContent;
    slider.setAttribute("aria-valuetext", output.value);
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "❚❚";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 700);
    show();
  });
  box.classList.add("live");
  player.hidden = false;
  show();
}
for (const chart of document.querySelectorAll(".chart")) {
  const svg = chart.querySelector("svg"), cursor = svg.querySelector(".cursor"), note = chart.querySelector("span");
  const lines = JSON.parse(svg.dataset.hover), values = [...chart.querySelectorAll("li b")];
  const before = values.map((value) => value.textContent), title = note.textContent;
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * svg.viewBox.baseVal.width;
    const near = lines.map((line) => line.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a, [1e9]));
    const at = near.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a, [1e9]);
    if (at.length < 4) return;
    near.forEach((point, index) => { values[index].textContent = point[3] ?? "–"; });
    note.textContent = "at " + at[2];
    cursor.setAttribute("x1", at[0]);
    cursor.setAttribute("x2", at[0]);
    cursor.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => {
    values.forEach((value, index) => { value.textContent = before[index]; });
    note.textContent = title;
    cursor.setAttribute("visibility", "hidden");
  });
}
