// What leaves the stage: answers to the clipboard, the conversation to the browser's own store.

/** To the clipboard as plain text; whether that worked. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text); // a page by plain HTTP from another machine has no clipboard of its own
  }
}

function copiedBySelection(text) {
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.style.position = "fixed"; // where it scrolls nothing
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  return worked;
}

function copyButton(name, text) {
  const button = make("button", "pb-copy", "Copy");
  button.type = "button";
  button.title = `${name}: copy as plain text`;
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

/** The turns, for the next time that the page is loaded. */
function keep(name, turns) {
  try {
    if (turns.length) localStorage.setItem(name, JSON.stringify(turns));
    else localStorage.removeItem(name);
  } catch {} // it is forbidden, or full: then nothing is kept
}
