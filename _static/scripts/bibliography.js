// Docutils marks a bibliography as a list, but its entries are not list items: screen readers would find it empty.
document.addEventListener("DOMContentLoaded", () => {
  for (const list of document.querySelectorAll(".citation-list")) list.removeAttribute("role");
});
