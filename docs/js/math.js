// Sets every formula of a page: Markdown pages carry \(…\) and \[…\], notebooks $…$ and $$…$$.
document.addEventListener("DOMContentLoaded", () => {
  renderMathInElement(document.body, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
      { left: "$", right: "$", display: false },
    ],
    ignoredClasses: ["clipboard-copy-txt"], // what the copy button of a notebook cell copies
    throwOnError: false,
  });
});
