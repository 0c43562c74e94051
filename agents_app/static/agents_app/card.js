// The card of an approval request: its dialogs, the check of edited arguments, and what happens to it meanwhile.

"use strict";

const CHECK_MS = 300;

document.addEventListener("DOMContentLoaded", () => {
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-opens]");
    if (opener) open(document.getElementById(opener.dataset.opens));
    if (event.target.closest("[data-closes]")) event.target.closest("dialog").close();
  });
  document.addEventListener("input", (event) => {
    const form = event.target.closest("form[data-check]");
    if (form && event.target.name === "arguments") checkSoon(form);
  });
  document.addEventListener("submit", (event) => {
    // One decision, also for who clicks twice.
    const button = event.target.querySelector('button[type="submit"]');
    if (event.target.closest("dialog") && button) setTimeout(() => (button.disabled = true));
  });
  for (const dialog of document.querySelectorAll("dialog[data-open]")) open(dialog);

  function open(dialog) {
    dialog.showModal();
    const form = dialog.querySelector("form[data-check]");
    if (form) check(form);
  }

  let timer = null;
  function checkSoon(form) {
    form.querySelector('button[type="submit"]').disabled = true;
    clearTimeout(timer);
    timer = setTimeout(() => check(form), CHECK_MS);
  }

  // The server applies the tool's schema, the agent's paths and the rules, and says how the arguments differ.
  async function check(form) {
    const text = form.elements.arguments.value;
    const error = form.querySelector("[data-error]");
    const button = form.querySelector('button[type="submit"]');
    let told;
    try {
      const answer = await fetch(form.dataset.check, { method: "POST", body: new FormData(form) });
      if (!answer.ok) throw new Error(answer.status);
      told = await answer.json();
      button.disabled = Boolean(told.error);
    } catch {
      // Sending checks once more, so that whoever is sure may go on.
      told = { error: "This cannot be checked at the moment. It will be when it is sent.", changes: "" };
      button.disabled = false;
    }
    if (form.elements.arguments.value !== text) return; // typed on: another check is on its way
    error.textContent = told.error;
    error.hidden = !told.error;
    // Rendered by the server's template, which escapes what others wrote.
    form.querySelector("[data-changes]").innerHTML = told.changes;
  }

  live((page) => {
    const fresh = page.getElementById("state");
    const shown = document.getElementById("state");
    if (shown.innerHTML !== fresh.innerHTML) shown.replaceWith(document.adoptNode(fresh));
    const decided = !page.querySelector("#decide dialog");
    const opened = document.querySelector("#decide dialog[open]");
    if (decided && opened) {
      // The person is in the middle of something: it is said there, and nothing is taken away.
      const meanwhile = opened.querySelector("[data-meanwhile]");
      const steps = [...document.querySelectorAll("#state .steps li")].slice(1);
      meanwhile.textContent = ["Decided meanwhile:", ...steps.map((step) => step.innerText.trim())].join("\n");
      meanwhile.hidden = false;
      opened.querySelector('button[type="submit"]').hidden = true;
      opened.addEventListener("close", () => document.getElementById("decide").replaceChildren(), { once: true });
    } else if (decided) {
      document.getElementById("decide").replaceChildren(...page.getElementById("decide").childNodes);
    }
  });
});
