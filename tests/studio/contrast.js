// The texts of a page whose contrast with what is behind them is below what WCAG 2.2 asks for (1.4.3).
(() => {
  const parts = text => [...text.match(/[\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3]));
  const luminance = color => {
    const [red, green, blue] = color.map(one => one / 255).map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const contrast = (one, other) => {
    const [light, dark] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (light + 0.05) / (dark + 0.05);
  };
  const ancestors = element => element ? [...ancestors(element.parentElement), element] : [];
  const found = [];
  function look(element, text, style) {
    const chain = ancestors(element).map(one => getComputedStyle(one));
    const opacity = chain.reduce((all, one) => all * one.opacity, 1);
    if (!opacity) return;
    const ground = chain.reduce((back, one) => over(parts(one.backgroundColor), back), [255, 255, 255]);
    const brightness = chain.reduce((all, one) => all * (one.filter.match(/^brightness\(([\d.]+)\)$/)?.[1] ?? 1), 1);
    const [red, green, blue, alpha] = parts(style.color);
    const ink = over([...[red, green, blue].map(one => Math.min(255, one * brightness)), alpha * opacity], ground);
    const size = parseFloat(style.fontSize), needed = size >= 24 || size >= 18.66 && style.fontWeight >= 700 ? 3 : 4.5;
    const ratio = contrast(ink, ground);
    if (ratio < needed) found.push(`${ratio.toFixed(2)} ${element.tagName}.${element.className}: ${text.trim().slice(0, 40)}`);
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || element.closest("svg, style, script, noscript")) continue;
    if (element.checkVisibility({ checkVisibilityCSS: true })) look(element, texts.currentNode.textContent, getComputedStyle(element));
  }
  for (const field of document.querySelectorAll("textarea, input:not([type=radio], [type=checkbox], [type=range], [type=file])")) {
    if (!field.checkVisibility()) continue;
    look(field, field.value, getComputedStyle(field));
    if (field.placeholder) look(field, field.placeholder, getComputedStyle(field, "::placeholder"));
  }
  return found;
})()
