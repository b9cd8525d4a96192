/** Mount the live figures of a page: every element with `data-figure`; `data-options` (JSON) sets its initial state. */

for (const place of document.querySelectorAll("[data-figure]")) {
  const { mount } = await import(`./${place.dataset.figure}.mjs`);
  mount(place, JSON.parse(place.dataset.options ?? "{}"));
}
