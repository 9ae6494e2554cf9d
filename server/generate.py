"""POST /generate: a checked body becomes plans, and generations become a plain reply or a stream."""

from fastapi import APIRouter, Request, Response
from msgspec import UNSET, Struct

from server import examples
from server.connection import EventStream, Job, SendEvent, beside_the_loop, read_body, while_connected
from server.documents import document
from server.errors import InvalidField
from server.generation import Generation, GenerationPlan, start_generations
from server.messages import Sampling
from server.prompts import Prompt, check_ids, is_list_of_inputs, read_prompts
from server.replies import GenerateReply, encode
from server.requests import request_state
from server.schemas import GenerateRequest, Parameters, parse
from server.service import Service
from server.text import StopStrings
