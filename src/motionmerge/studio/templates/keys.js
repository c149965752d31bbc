// Tab leaves every field: gradio's dropdowns would stay open over others, and its editor would indent.
addEventListener("keydown", event => {
  if (event.key === "Tab" && event.target.matches?.("[role=combobox], .cm-content")) event.stopImmediatePropagation();
}, true);
// What is typed into a dropdown replaces what it says; otherwise it would be appended to "all of them".
addEventListener("focusin", event => event.target.matches?.("[role=combobox]") && event.target.select());
