"""GET /schema and GET /docs: what the API is, for programs and for people. Both are open."""

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render

from events_app.database import read
from orchestrator_site.http import allow

# Swagger UI sets styles on its elements and has its icons as data; it needs nothing else beyond files of its own.
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; worker-src blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)


@allow("GET", "HEAD")
async def schema(request: HttpRequest) -> HttpResponseBase:
    """The OpenAPI document as JSON, with `?format=yaml` as YAML."""
    # Imported late: nobody else should wait for the library that makes it.
    from orchestrator_site.schema import document

    if request.GET.get("format") == "yaml":
        return HttpResponse(await read(document.as_yaml), content_type="application/yaml")
    return HttpResponse(await read(document.as_json), content_type="application/json")


@allow("GET", "HEAD")
async def docs(request: HttpRequest) -> HttpResponseBase:
    response = render(request, "schema/docs.html")
    response["Content-Security-Policy"] = POLICY
    return response
