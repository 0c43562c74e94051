"use strict";

SwaggerUIBundle({
  url: "schema",
  dom_id: "#docs",
  deepLinking: true,
  displayRequestDuration: true,
  // The badge would send the address of this page to another host.
  validatorUrl: null,
});
