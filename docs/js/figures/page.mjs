/** Mounts the live figures of a page: every element with `data-figure`, its start in `data-options` (JSON), if any. */

for (const place of document.querySelectorAll("[data-figure]")) {
  const { mount } = await import(`./${place.dataset.figure}.mjs`);
  mount(place, JSON.parse(place.dataset.options ?? "{}"));
}
