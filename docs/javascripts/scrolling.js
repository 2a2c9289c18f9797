// Tables that are wider than their box can be scrolled by keyboard too: the theme makes the boxes when a page is there.
document.addEventListener("DOMContentLoaded", () => {
  requestAnimationFrame(() => {
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) {
      if (box.scrollWidth > box.clientWidth) {
        box.tabIndex = 0;
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", "Table, scrolls sideways");
      }
    }
  });
});
