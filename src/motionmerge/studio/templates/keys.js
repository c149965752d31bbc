// Tab leaves a dropdown: gradio takes it for a letter, and its list would stay open over other fields.
addEventListener("keydown", event => {
  if (event.key === "Tab" && event.target.matches?.("[role=combobox]")) event.stopImmediatePropagation();
}, true);
