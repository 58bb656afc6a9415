"use strict";
const keys = document.getElementById("keys");
keys.checked = sessionStorage.getItem("keys") !== "off";
keys.closest("label").hidden = false;
keys.addEventListener("change", () => sessionStorage.setItem("keys", keys.checked ? "on" : "off"));
document.addEventListener("keydown", (event) => {
  if (!keys.checked || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const button = document.querySelector(`button[data-key="${CSS.escape(event.key)}"]`);
  if (button) button.click();
});
