// The approval queue: rows come and go where they stand, so that ticks, dialogs and the scroll position stay.

"use strict";

const QUEUE_LINK = 'a[href$="/agents_app/pendingapproval/"]'; // in the sidebar, with the number of those waiting

document.addEventListener("DOMContentLoaded", () => {
  const keyOf = (row) => row.querySelector('input[name="_selected_action"]')?.value ?? row.querySelector("a").href;
  const rowsOf = (page) => [...page.querySelectorAll("#result_list > tbody")];

  function mergeRows(table, fresh) {
    const shown = new Map(rowsOf(document).map((row) => [keyOf(row), row]));
    const kept = new Set(fresh.map(keyOf));
    for (const [key, row] of shown) if (!kept.has(key)) row.remove();
    let last = null;
    for (const row of fresh) {
      const old = shown.get(keyOf(row));
      const next = last ? last.nextElementSibling : table.querySelector("tbody");
      const placed = old ?? document.adoptNode(row);
      if (placed !== next) table.insertBefore(placed, last ? last.nextSibling : next);
      if (!old) placed.classList.add("just-came");
      last = placed;
    }
  }

  // Rows above the first one in sight may come and go: it stays where it is.
  function holdingScroll(change) {
    const inSight = rowsOf(document).filter((row) => row.getBoundingClientRect().bottom > 0);
    const tops = inSight.map((row) => [row, row.getBoundingClientRect().top]);
    const was = document.documentElement.style.overflowAnchor;
    document.documentElement.style.overflowAnchor = "none";
    change();
    const anchor = tops.find(([row]) => row.isConnected);
    if (anchor && window.scrollY > 0) window.scrollBy(0, anchor[0].getBoundingClientRect().top - anchor[1]);
    document.documentElement.style.overflowAnchor = was;
  }

  live((page) => {
    for (const counted of [".queue-count", "#header-inner h1", "#pages", QUEUE_LINK]) {
      document.querySelector(counted).replaceChildren(...page.querySelector(counted).childNodes);
    }
    const [table, fresh] = [document.getElementById("result_list"), page.getElementById("result_list")];
    if (table && fresh) {
      holdingScroll(() => mergeRows(table, rowsOf(page)));
    } else if (table || fresh) {
      // From the first request or to the last: there is nothing ticked that could get lost.
      const form = document.getElementById("changelist-form");
      form.replaceChildren(...page.getElementById("changelist-form").childNodes);
    }
    document.title = document.title.replace(/^(\(\d+\) )?/, `(${document.getElementById("waiting-count").textContent}) `);
  });
});
