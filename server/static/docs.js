// Shows /openapi.json. Behind a key, asks for it first: a browser sends none by itself. The key stays
// in this page's memory, and goes with the requests that are tried here.
"use strict";

const form = document.getElementById("key");
const told = document.getElementById("told");

async function open(key) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch(`${document.body.dataset.root}/openapi.json`, { headers });
  if (reply.status === 401) {
    form.hidden = false;
    told.textContent = key ? "This is not one of its keys." : "";
    return;
  }
  const spec = await reply.json();
  form.hidden = true;
  const ui = SwaggerUIBundle({
    spec,
    domNode: document.getElementById("api"),
    deepLinking: true,
    validatorUrl: null, // nothing is asked of other servers
    onComplete: () => {
      if (key) ui.preauthorizeApiKey(Object.keys(spec.components.securitySchemes)[0], key);
    },
  });
}

function tell(error) {
  form.hidden = false;
  told.textContent = String(error);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  open(form.querySelector("input").value).catch(tell);
});
open("").catch(tell);
